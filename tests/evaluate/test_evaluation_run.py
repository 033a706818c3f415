# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation against an endpoint of a few lines in place of ``vllm serve``."""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from store_samples import NAMESPACE, make_features, make_record
from typer.testing import CliRunner

from attncache_vllm import cli
from attncache_vllm.calibrate.bootstrap import resamples
from attncache_vllm.errors import AttnCacheError, SettingsError
from attncache_vllm.evaluate import run, tasks
from attncache_vllm.evaluate.command import read_settings
from attncache_vllm.evaluate.files import write_rows
from attncache_vllm.evaluate.run import EvaluateOptions, embed, evaluate
from attncache_vllm.evaluate.server import Server
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store import LocalStore

ENTRIES = 5
TOO_LONG = "too long"
LAYERS = (1, 3)
PLAN = Plan.reusing(NAMESPACE.num_layers, NAMESPACE.num_kv_heads, LAYERS, 0.25)


class Endpoint:
    """Answers with an embedding that depends on the text, and on ``noise``; counts as we do."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.settings = None
        if "--additional-config" in arguments:
            config = arguments[arguments.index("--additional-config") + 1]
            self.settings = json.loads(config)["attncache"]
        self.bodies: list[dict[str, Any]] = []
        self.hits = self.misses = 0

    @property
    def noise(self) -> float:
        if self.settings is None:
            return 0.0
        return 2.0 if "plan" in self.settings else 0.1

    def embedding(self, text: str) -> list[float]:
        draw = random.Random(hashlib.sha256(text.encode()).digest())
        exact = [draw.gauss(0, 1) for _ in range(8)]
        return [value + self.noise * draw.gauss(0, 1) for value in exact]

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        if self.settings is not None:
            self.misses += sum("miss" in text for text in body["input"])
            self.hits += sum("miss" not in text for text in body["input"])
        data = [
            {"object": "embedding", "index": i, "embedding": self.embedding(text)}
            for i, text in enumerate(body["input"])
        ]
        return {"object": "list", "model": "served", "data": data}

    def metrics(self) -> str:
        if self.settings is None:
            return ""
        return (
            "# TYPE attncache_sequences_total counter\n"
            f'attncache_sequences_total{{outcome="hit"}} {self.hits}\n'
            f'attncache_sequences_total{{outcome="miss"}} {self.misses}\n'
            "# TYPE attncache_hits_total counter\n"
            f'attncache_hits_total{{source="neighbour"}} {self.hits}\n'
            "# TYPE attncache_canary_error gauge\n"
            'attncache_canary_error{layer="3",source="neighbour"} 0.02\n'
        )


@contextmanager
def listening(endpoint: Endpoint) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, endpoint.metrics().encode(), "text/plain")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if TOO_LONG in body["input"]:
                refusal = {"error": {"message": "at most 512 tokens", "code": 400}}
                self.reply(400, json.dumps(refusal).encode(), "application/json")
            else:
                reply = json.dumps(endpoint.answer(body)).encode()
                self.reply(200, reply, "application/json")

        def reply(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}", Path(), None)  # type: ignore[arg-type]
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "resamples", lambda items, seed: resamples(items, seed, 60))


@pytest.fixture
def endpoints(monkeypatch: pytest.MonkeyPatch) -> list[Endpoint]:
    """The servers that an evaluation starts, in their order."""
    started: list[Endpoint] = []

    @contextmanager
    def serve(model: str, arguments: Sequence[str], log: Path) -> Iterator[Server]:
        assert log.name.endswith(".log")
        started.append(Endpoint(arguments))
        with listening(started[-1]) as server:
            yield server

    monkeypatch.setattr(run, "serve", serve)
    return started


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with LocalStore.create(path, NAMESPACE, {"layers": list(LAYERS)}) as store:
        for number in range(ENTRIES):
            store.put(make_record(number))
        report = {"calibration": {"predicted": {"rank_fidelity": 0.99}}}
        store.publish(PLAN.to_dict(), b"projector", report, make_features(ENTRIES))
    return path


@pytest.fixture
def options(tmp_path: Path, store: Path) -> dict[str, Any]:
    texts = [{"text": f"text {i}{' miss' if i % 4 == 0 else ''}"} for i in range(40)]
    return {
        "model": "models/little",
        "store": store,
        "out": tmp_path / "out",
        "texts": write_rows(tmp_path / "texts.jsonl", texts),
    }


def test_the_report_tells_damage_shares_and_doubt(
    options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    report = evaluate(EvaluateOptions(**options))
    (row,) = report["rows"]
    assert (row["model"], row["workload"], row["texts"]) == ("little", "texts", 40)
    assert row["hit_rate"] == 0.75
    assert row["layers_reused_share"] == row["groups_reused_share"]
    assert row["groups_reused_share"] == 0.75 * len(LAYERS) / NAMESPACE.num_layers
    assert row["rows_reused_share"] is None
    assert 0.9 < row["rank_fidelity"] < 1
    low, high = row["ci95"]["rank_fidelity"]
    assert low < row["rank_fidelity"] < high
    assert row["counts"]["outcomes"] == {"hit": 30, "miss": 10}
    assert row["published_rule"] is None
    assert report["calibration"] == {"predicted": {"rank_fidelity": 0.99}}
    assert report["canaries"] == [{"layer": 3, "source": "neighbour", "error": 0.02}]
    assert json.loads(json.dumps(report)) == report


def test_both_servers_are_asked_the_same_with_the_same_options(
    options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    evaluate(EvaluateOptions(**options, serve_options=("--dtype", "bfloat16")))
    reuse, stock = endpoints
    assert stock.arguments == ["--dtype", "bfloat16"]
    assert reuse.arguments[:4] == [*stock.arguments, "--attention-backend", "attncache"]
    assert stock.bodies == reuse.bodies
    assert all(body["truncate_prompt_tokens"] == -1 for body in stock.bodies)
    assert max(len(body["input"]) for body in stock.bodies) <= run.BATCH


def test_late_lookups_are_waited_for_unless_the_user_says_otherwise(
    options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    evaluate(EvaluateOptions(**options, settings={"min_tokens": 1}))
    evaluate(EvaluateOptions(**options, settings={"lookup_deadline_ms": 5.0}))
    patient, hurried = (e.settings for e in endpoints if e.settings is not None)
    assert patient == {"store": str(options["store"]), "min_tokens": 1, **run.PATIENT}
    assert hurried["lookup_deadline_ms"] == 5.0


def test_the_published_rule_is_measured_beside_on_the_same_store(
    options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    report = evaluate(EvaluateOptions(**options, published_gate=1.5))
    (row,) = report["rows"]
    assert row["published_rule"]["rank_fidelity"] < row["rank_fidelity"] - 0.1
    (by_rule,) = (e for e in endpoints if e.settings is not None and "plan" in e.settings)
    plan = Plan.from_dict(json.loads(Path(by_rule.settings["plan"]).read_text()))
    assert set(plan.sources) == {"neighbour"}
    assert plan.sources["neighbour"].gate == 1.5
    assert plan.reused_layers == LAYERS, "every layer that the store has maps of"
    assert all(plan.sources["neighbour"].groups[layer] for layer in LAYERS)


def test_tasks_are_counted_apart(
    tmp_path: Path, options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    edits = [{"text": f"new {i} miss", "original": f"old {i}"} for i in range(6)]
    options["edits"] = write_rows(tmp_path / "edits.jsonl", edits)
    texts, edited = evaluate(EvaluateOptions(**options))["rows"]
    assert (texts["hit_rate"], edited["hit_rate"]) == (0.75, 0)
    assert edited["stale_rank_fidelity"] < 0.6 < edited["rank_fidelity"]
    reuse, stock = ([text for body in e.bodies for text in body["input"]] for e in endpoints)
    assert set(stock) - set(reuse) == {f"old {i}" for i in range(6)}


def test_raw_embeddings_are_not_normalised_and_not_cut() -> None:
    endpoint = Endpoint([])
    with listening(endpoint) as server:
        assert embed(server, ["a"], raw=True) == [pytest.approx(endpoint.embedding("a"))]
        (body,) = endpoint.bodies
        assert body["use_activation"] is False and "truncate_prompt_tokens" not in body
        with pytest.raises(AttnCacheError, match="at most 512 tokens"):
            embed(server, ["a", TOO_LONG], raw=True)


def test_mistakes_are_found_before_a_server_is_started(
    tmp_path: Path, options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    with pytest.raises(SettingsError, match="needs a task"):
        evaluate(EvaluateOptions(**{**options, "texts": None}))
    with pytest.raises(SettingsError, match="must be readable"):
        evaluate(EvaluateOptions(**options, pairs=tmp_path / "absent.jsonl"))
    with pytest.raises(SettingsError, match="the plan must be readable"):
        evaluate(EvaluateOptions(**options, settings={"plan": str(tmp_path / "absent.json")}))
    LocalStore.create(tmp_path / "new", NAMESPACE, {}).close()
    with pytest.raises(SettingsError, match="without a plan"):
        evaluate(EvaluateOptions(**{**options, "store": tmp_path / "new"}))
    assert endpoints == []


def test_the_plan_of_the_settings_is_the_one_that_is_reported(
    tmp_path: Path, options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    other = Plan.reusing(NAMESPACE.num_layers, NAMESPACE.num_kv_heads, (3,), 0.5)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(other.to_dict()))
    report = evaluate(EvaluateOptions(**options, settings={"plan": str(path)}))
    assert Plan.from_dict(report["plan"]) == other
    assert report["rows"][0]["layers_reused_share"] == 0.75 / NAMESPACE.num_layers


def attncache(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(part) for part in arguments])


def test_the_command_writes_a_report_and_a_page(
    options: dict[str, Any], endpoints: list[Endpoint]
) -> None:
    result = attncache(
        *("evaluate", "little", "--store", options["store"], "--out", options["out"]),
        *("--texts", options["texts"], "--published-rule", 2, "--settings", '{"min_tokens": 1}'),
        *("--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    assert "rank fidelity" in result.stdout
    report = json.loads((options["out"] / "report.json").read_text())
    assert report["settings"] == {**run.PATIENT, "min_tokens": 1}
    assert report["published_gate"] == 2
    page = (options["out"] / "report.html").read_text()
    assert f"{report['rows'][0]['rank_fidelity']:.4f}" in page
    assert "<script" not in page
    assert set(re.findall("(?:href|src|url)[=(].http[^ ]*", page)) == set(), "nothing is fetched"
    assert page.count("<svg") == 1, "canaries; there is no calibration, and no projector to draw by"


def test_the_command_says_a_mistake_in_one_line(options: dict[str, Any]) -> None:
    arguments = ("evaluate", "little", "--store", options["store"], "--out", options["out"])
    for wrong, said in (
        (("--texts", options["texts"], "--attention-backend", "triton"), "sets"),
        (("--texts", options["texts"], "--settings", "[]"), "--settings must be a JSON object"),
        ((), "needs a task"),
    ):
        result = attncache(*arguments, *wrong)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and said in result.stderr
        assert result.stderr.count("\n") == 1


def test_settings_are_an_object_or_a_file_of_one(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"min_tokens": 4}')
    assert read_settings(str(path)) == read_settings('{"min_tokens": 4}') == {"min_tokens": 4}
    assert read_settings(None) == {}
