# SPDX-License-Identifier: Apache-2.0
"""A compiled ``vllm serve --attention-backend attncache`` and the ``openai`` client."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import yaml
from numpy.typing import NDArray

from benchmarks.server import MODEL_NAME, Server, serve
from integration_tests.compare import cosines
from integration_tests.conftest import PATIENT, Texts
from integration_tests.engine import Engine, Prompt
from integration_tests.processes import shown_on_failure

CONCURRENT = 200


@pytest.fixture(scope="module")
def stock_compiled(
    embedder: dict[str, Any], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> dict[Prompt, NDArray[np.float32]]:
    """Stock vLLM's answers under torch.compile, each prompt alone. The engine has ended."""
    log = tmp_path_factory.mktemp("stock-compiled") / "engine.log"
    with Engine(log, **{**embedder, "enforce_eager": False}) as engine:
        return dict(zip(texts.everything, engine.embed_alone(texts.everything), strict=True))


@pytest.fixture(scope="module")
def copied_store(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store that only this server uses."""
    return shutil.copytree(store, tmp_path_factory.mktemp("served") / "store")


@pytest.fixture(scope="module")
def server(
    model: Path,
    copied_store: Path,
    embedder: dict[str, Any],
    stock_compiled: object,  # first, because it ends before this server starts
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump({"store": str(copied_store), **PATIENT}))
    options = [
        *("--attention-backend", "attncache"),
        *("--additional-config", f'{{"attncache": "{settings}"}}'),
        *("--max-model-len", str(embedder["max_model_len"])),
        *("--max-num-batched-tokens", str(embedder["max_num_batched_tokens"])),
    ]
    log = folder / "vllm-serve.log"
    with serve(model, options, log) as server, shown_on_failure(log):
        yield server


@pytest.fixture(scope="module")
def alone(server: Server, texts: Texts) -> dict[Prompt, NDArray[np.float32]]:
    """The server's answer to each prompt when it is the only one."""
    answers = [embed(server, prompt) for prompt in texts.everything]
    return dict(zip(texts.everything, answers, strict=True))


def embed(server: Server, prompt: Prompt, salt: str | None = None) -> NDArray[np.float32]:
    response = server.client().embeddings.create(
        model=MODEL_NAME, input=_openai_input(prompt), extra_body=_with_salt(salt)
    )
    return np.array(response.data[0].embedding, dtype=np.float32)


def embed_concurrently(
    server: Server, prompts: Sequence[Prompt], salts: Sequence[str | None] | None = None
) -> NDArray[np.float32]:
    """Embeddings ``[B, D]`` of prompts that are all sent at once, each in a request."""
    salts = [None] * len(prompts) if salts is None else salts

    async def send_all() -> list[list[float]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            responses = await asyncio.gather(
                *(
                    client.embeddings.create(
                        model=MODEL_NAME, input=_openai_input(prompt), extra_body=_with_salt(salt)
                    )
                    for prompt, salt in zip(prompts, salts, strict=True)
                )
            )
        return [response.data[0].embedding for response in responses]

    return np.array(asyncio.run(send_all()), dtype=np.float32)


def _openai_input(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)


def _with_salt(salt: str | None) -> dict[str, str] | None:
    return None if salt is None else {"cache_salt": salt}


def outcomes(server: Server) -> dict[str, float]:
    counted = server.counters("attncache_sequences", "outcome")
    return {outcome: counted.get(outcome, 0) for outcome in ("hit", "miss", "bypass")}


def test_start_is_announced_in_one_line(server: Server, texts: Texts) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "attncache: active" in line]
    assert len(lines) == 1
    for part in ("namespace ", f"{len(texts.recorded)} entries", "30 of 30 layers", "MiB"):
        assert part in lines[0]


def test_recorded_text_hits_and_keeps_its_embedding(
    server: Server, stock_compiled: dict[Prompt, NDArray[np.float32]], texts: Texts
) -> None:
    before = outcomes(server)
    answers = np.stack([embed(server, text) for text in texts.recorded])
    assert outcomes(server) == {**before, "hit": before["hit"] + len(texts.recorded)}
    expected = np.stack([stock_compiled[text] for text in texts.recorded])
    assert cosines(answers, expected).min() >= 0.999


def test_unrelated_text_misses_and_is_answered_as_by_stock(
    server: Server, stock_compiled: dict[Prompt, NDArray[np.float32]], texts: Texts
) -> None:
    prompts: tuple[Prompt, ...] = (*texts.unrelated, *texts.lengths)
    before = outcomes(server)
    answers = np.stack([embed(server, prompt) for prompt in prompts])
    assert outcomes(server) == {**before, "miss": before["miss"] + len(prompts)}
    # Not bit-equal: what torch.compile fuses around the opaque op, it rounds less often.
    expected = np.stack([stock_compiled[prompt] for prompt in prompts])
    assert cosines(answers, expected).min() >= 0.99995


def test_metrics_count_every_sequence_once(server: Server, texts: Texts) -> None:
    before = outcomes(server)
    inputs = [*texts.recorded[:3], *texts.unrelated[:2]]
    server.client().embeddings.create(model=MODEL_NAME, input=inputs)
    embed(server, texts.short[0])
    after = outcomes(server)
    counted = {outcome: after[outcome] - before[outcome] for outcome in after}
    assert counted == {"hit": 3, "miss": 2, "bypass": 1}
    assert sum(server.counters("attncache_misses", "reason").values()) == after["miss"]
    assert sum(server.counters("attncache_bypasses", "reason").values()) == after["bypass"]


def test_concurrent_requests_get_the_answers_they_get_alone(
    server: Server, alone: dict[Prompt, NDArray[np.float32]], texts: Texts
) -> None:
    prompts = random.Random(0).choices(texts.everything, k=CONCURRENT)
    before = outcomes(server)
    answers = embed_concurrently(server, prompts)
    expected = np.stack([alone[prompt] for prompt in prompts])
    assert cosines(answers, expected).min() >= 0.999
    after = outcomes(server)
    assert sum(after.values()) - sum(before.values()) == CONCURRENT
    hits = sum(prompt in texts.recorded for prompt in prompts)
    assert after["hit"] - before["hit"] == hits > 0


def test_what_is_stored_for_the_shared_tenant_is_found_without_a_salt_only(
    server: Server, stock_compiled: dict[Prompt, NDArray[np.float32]], texts: Texts
) -> None:
    salt = "a secret of this tenant"
    before = outcomes(server)
    salted = np.stack([embed(server, text, salt) for text in texts.recorded])
    assert outcomes(server) == {**before, "miss": before["miss"] + len(texts.recorded)}
    # Not bit-equal, see above.
    expected = np.stack([stock_compiled[text] for text in texts.recorded])
    assert cosines(salted, expected).min() >= 0.99995
    embed(server, texts.recorded[0])
    assert outcomes(server)["hit"] == before["hit"] + 1
    # In the same batches as well.
    before = outcomes(server)
    asked = [(text, s) for text in texts.recorded for s in (None, salt, "another secret")]
    random.Random(1).shuffle(asked)
    embed_concurrently(server, [text for text, _ in asked], [s for _, s in asked])
    hits, misses = before["hit"] + len(texts.recorded), before["miss"] + 2 * len(texts.recorded)
    assert outcomes(server) == {**before, "hit": hits, "miss": misses}
    assert salt not in server.log.read_text()


# Last: the server has no store afterwards.
def test_store_deleted_under_the_server_fails_no_request(
    server: Server,
    copied_store: Path,
    alone: dict[Prompt, NDArray[np.float32]],
    texts: Texts,
) -> None:
    shutil.rmtree(copied_store)
    before = outcomes(server)
    prompts = texts.everything
    answers = embed_concurrently(server, prompts)
    # Reused from what is mapped or resident, or exact: the same answer within bf16 rounding.
    assert cosines(answers, np.stack([alone[prompt] for prompt in prompts])).min() >= 0.999
    assert sum(outcomes(server).values()) - sum(before.values()) == len(prompts)
