# SPDX-License-Identifier: Apache-2.0
"""The seams between the plugin and vLLM: every patch and every internal the plugin leans on.

Each seam says Why it exists, How it is made, where the Upstream code is, and When it can go.
Written for and tested with vLLM 0.32.0; see CONTRIBUTING.md for moving to another release.
"""

from attncache_vllm.engine.compat.batches import (
    Builders,
    MetadataSource,
    Prompt,
    attention_layer,
    build_metadata,
    bypass_counter,
    call_when_ready,
    context_lengths,
    forward_context,
    forward_of_layer,
    hook_cache_initialization,
    hook_model_runner,
    layer_metadata,
    leave_bypass_counter,
    metadata_of_prompts,
    metadata_source,
    most_tokens,
    prompts,
    remember_source,
    source_of_rows,
    sub_batch,
)
from attncache_vllm.engine.compat.heads import (
    Forward,
    attend_some_heads,
    can_leave_out_heads,
    copy_of,
    metadata_of_heads,
)
from attncache_vllm.engine.compat.models import Linear, build_without_weights, linear
from attncache_vllm.engine.compat.runtime import (
    get_logger,
    register_op,
    set_num_threads,
    warn_once,
)
from attncache_vllm.engine.compat.selection import (
    BACKEND_NAME,
    TESTED_VLLM,
    captures_ops,
    check_vllm_version,
    install,
    is_selected,
    register_backend_name,
)

__all__ = [
    "BACKEND_NAME",
    "TESTED_VLLM",
    "Builders",
    "Forward",
    "Linear",
    "MetadataSource",
    "Prompt",
    "attend_some_heads",
    "attention_layer",
    "build_metadata",
    "build_without_weights",
    "bypass_counter",
    "call_when_ready",
    "can_leave_out_heads",
    "captures_ops",
    "check_vllm_version",
    "context_lengths",
    "copy_of",
    "forward_context",
    "forward_of_layer",
    "get_logger",
    "hook_cache_initialization",
    "hook_model_runner",
    "install",
    "is_selected",
    "layer_metadata",
    "leave_bypass_counter",
    "linear",
    "metadata_of_heads",
    "metadata_of_prompts",
    "metadata_source",
    "most_tokens",
    "prompts",
    "register_backend_name",
    "register_op",
    "remember_source",
    "set_num_threads",
    "source_of_rows",
    "sub_batch",
    "warn_once",
]
