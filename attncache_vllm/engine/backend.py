# SPDX-License-Identifier: Apache-2.0
"""The registered attention backend: the platform's standard backend, observed.

Kernels, KV cache and metadata stay the standard backend's own. Two things are added: its metadata
builder remembers what it built from, so that a sub-batch can be built later; and while maps are
being recorded its implementation shows q and k to the recorder.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend

from attncache_vllm.config import load_settings
from attncache_vllm.engine import compat


class AttnCacheBackend(AttentionBackend):
    """Stands for the name ``attncache``; engines get :func:`wrap_backend`'s subclass instead."""


def wrap_backend(standard_path: str) -> str:
    """Subclass the backend at ``standard_path`` and return the path of the subclass."""
    standard = resolve_obj_by_qualname(standard_path)
    recording = load_settings(get_current_vllm_config().additional_config).record is not None
    wrapped = _wrap(standard, recording)
    # vLLM resolves backends by path; a class made at run time needs a name in a module.
    globals()[wrapped.__name__] = wrapped
    return f"{__name__}.{wrapped.__name__}"


@functools.cache
def _wrap(standard: type[AttentionBackend], recording: bool) -> type[AttentionBackend]:
    builder_cls = _observing_builder(standard.get_builder_cls())
    impl_cls = _recording_impl(standard.get_impl_cls()) if recording else standard.get_impl_cls()
    return type(
        ("Recording" if recording else "Reusing") + standard.__name__,
        (standard,),
        {
            "__module__": __name__,
            "get_builder_cls": staticmethod(lambda: builder_cls),
            "get_impl_cls": staticmethod(lambda: impl_cls),
        },
    )


def _observing_builder(standard: type) -> type:
    class ObservingMetadataBuilder(standard):
        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args)
            self._count_bypass = compat.bypass_counter(vllm_config, layer_names)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            built = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            source = compat.MetadataSource(self, common_attn_metadata)
            compat.remember_source(built, source)
            if self._count_bypass is not None:
                self._count_bypass(source)
            return built

    return ObservingMetadataBuilder


def _recording_impl(standard: type) -> type:
    class RecordingAttentionImpl(standard):
        def forward(
            self, layer: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
        ) -> Any:
            recorded = getattr(layer, "attncache", None)
            if recorded is not None:
                recorded.record_map(query, key, self.scale)
            return super().forward(layer, query, key, value, *args, **kwargs)

    return RecordingAttentionImpl
