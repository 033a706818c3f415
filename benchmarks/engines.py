# SPDX-License-Identifier: Apache-2.0
"""Live engines that are asked in turn.

A machine's speed drifts by more than what is measured, so engines live side by side, each in a
process of its own, and batches alternate between them. Front ends are left out: a batch is timed
from the engine's input to its answers. The core that ``vllm serve`` keeps for its front end is not
computed on either.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from attncache_vllm.reuse.plan import Plan
from benchmarks.server import MEAN_EMBEDDINGS

Mode = Literal["standard", "reuse", "floor"]
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Reply:
    """A batch's wall time, how many of its sequences were served from maps, its answers (one list
    of floats each), the most memory that the process ever held, in MiB, and, if it was profiled,
    the seconds spent in each operator itself."""

    seconds: float
    hits: int
    answers: list[list[float]]
    peak_mib: float
    operators: dict[str, float]


class Engine:
    """The near end of an engine."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ask(
        self, prompts: Prompts, cold: bool = False, profile: bool = False, dropped: float = 0.0
    ) -> Reply:
        """Answers to token ids, from maps that have ``dropped`` a share (see ``TiledMap.pruned``);
        ``cold`` finds none that is decoded already, and leaves none."""
        self._pipe.send((prompts, cold, profile, dropped))
        reply: Reply = self._pipe.recv()
        return reply

    def starts(self) -> bool:
        """Wait until it answers; whether it will."""
        try:
            return bool(self._pipe.recv() == "ready")
        except EOFError:
            return False


@contextmanager
def engines(
    model: Path, max_tokens: int, folder: Path, settings: dict[str, Any]
) -> Iterator[dict[Mode, Engine]]:
    """Start one of each mode, all at once, and wait until they answer: vLLM as it is, the plugin,
    and the floor of what reuse can cost, which is the plugin's model with V rows and no map at all.

    Args:
        model: its folder.
        max_tokens: longest sequence, and most tokens of a step.
        folder: where the engines write their logs.
        settings: of the plugin.
    """
    with ExitStack() as stack:
        found = {
            mode: stack.enter_context(
                _process(mode, model, max_tokens, folder / f"{mode}.log", settings)
            )
            for mode in get_args(Mode)
        }
        for mode, live in found.items():
            if not live.starts():
                raise RuntimeError(f"engine {mode!r} did not start, see {folder / mode}.log")
        yield found


@contextmanager
def _process(
    mode: Mode, model: Path, max_tokens: int, log: Path, settings: dict[str, Any]
) -> Iterator[Engine]:
    near, far = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=_run, args=(far, mode, model, max_tokens, log, settings), daemon=True
    )
    with _bound():
        process.start()
    far.close()
    try:
        yield Engine(near)
    except EOFError:
        raise RuntimeError(f"engine {mode!r} ended, see {log}") from None
    finally:
        near.close()  # ends its loop
        process.join(30)
        if process.is_alive():
            process.kill()


@contextmanager
def _bound() -> Iterator[None]:
    """Processes that are started meanwhile compute on all cores but the last, if there are more:
    what ``vllm serve`` binds its worker to, in the same way."""
    cores = sorted(os.sched_getaffinity(0))
    cores = cores[:-1] or cores
    binding = {
        "OMP_NUM_THREADS": str(len(cores)),
        "OMP_PLACES": f"{{{','.join(map(str, cores))}}}",
        "OMP_PROC_BIND": "true",
    }
    before = {name: os.environ.get(name) for name in binding}
    os.environ.update(binding)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(
    pipe: Connection,
    mode: Mode,
    model: Path,
    max_tokens: int,
    log: Path,
    settings: dict[str, Any],
) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from attncache_vllm.serve_options import engine_args

    if mode == "floor":
        _serve_no_maps()
    arguments = engine_args(str(model), MEAN_EMBEDDINGS)
    arguments.max_model_len = max_tokens
    arguments.max_num_batched_tokens = max_tokens
    arguments.kv_cache_memory_bytes = 2**30
    if torch.cuda.is_available():
        arguments.gpu_memory_utilization = 0.25  # the three of them share one
    if mode != "standard":
        arguments.attention_backend = "attncache"
        arguments.additional_config = {"attncache": settings}
    llm: Any = LLM.from_engine_args(arguments)
    pipe.send("ready")
    # By what their maps have dropped: a change of that does not forget the others.
    kept: dict[float, Any] = {}
    while True:
        try:
            prompts, cold, profile, dropped = pipe.recv()
        except EOFError:
            return
        _choose_maps(llm, kept, dropped, cold)
        pipe.send(_answer(llm, prompts, profile))


def _choose_maps(llm: Any, kept: dict[float, Any], dropped: float, cold: bool) -> None:
    """Have lookups give maps that have ``dropped`` a share; ``kept`` holds those that are decoded,
    by that share, of which ``cold`` takes and leaves none."""
    from attncache_vllm.engine.runtime import serving_of

    serving = serving_of(llm.llm_engine.vllm_config)
    if serving is None:
        return
    lookups: Any = serving._lookups
    nothing = type(lookups.resident)(lookups.resident.max_bytes)
    lookups.resident = nothing if cold else kept.setdefault(dropped, nothing)
    lookups._plan = _dropping(lookups._plan, dropped)


def _answer(llm: Any, prompts: Prompts, profile: bool) -> Reply:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from attncache_vllm.engine.runtime import serving_of

    serving = serving_of(llm.llm_engine.vllm_config)
    given = [{"prompt_token_ids": list(ids)} for ids in prompts]
    before = 0 if serving is None else serving.outcomes.sequences["hit"]
    operators = {}
    with profiled(activities=[ProfilerActivity.CPU]) if profile else nullcontext() as trace:
        started = time.perf_counter()
        outputs = llm.encode(given, pooling_task="embed", use_tqdm=False)
        seconds = time.perf_counter() - started
    if trace is not None:
        operators = {row.key: row.self_cpu_time_total / 1e6 for row in trace.key_averages()}
    hits = 0 if serving is None else serving.outcomes.sequences["hit"] - before
    answers = [output.outputs.data.float().tolist() for output in outputs]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Reply(seconds, hits, answers, peak, operators)


def _dropping(plan: Plan, share: float) -> Plan:
    """The plan whose maps have lost ``share`` in every layer."""
    dropped = (share,) * plan.num_layers if share else ()
    sources = {name: replace(part, dropped=dropped) for name, part in plan.sources.items()}
    return replace(plan, sources=sources)


def _serve_no_maps() -> None:
    """Have the layers that reuse maps answer from V rows alone, as plain code that is compiled with
    the rest of the model, and look nothing up."""
    from torch import Tensor

    from attncache_vllm.engine import ops
    from attncache_vllm.engine.answers import ValueProjection
    from attncache_vllm.engine.modules import AttentionModule

    def replace_forward(found: AttentionModule, treatment: object) -> None:
        projection, output, inputs = ValueProjection(found), found.output_proj, found.inputs
        group = found.layout.group
        assert inputs is not None and output is not None

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden: Tensor = inputs.given(args, kwargs)[inputs.hidden]
            value = projection(hidden).unsqueeze(2)
            return output(value.expand(-1, -1, group, -1).flatten(1))[0]

        found.module.forward = forward

    ops.replace_forward = replace_forward
    ops.observe_input = lambda found, observer: None
