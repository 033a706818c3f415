# SPDX-License-Identifier: Apache-2.0
"""The registered attention backend: the platform's standard backend, observed.

Kernels, KV cache and metadata stay the standard backend's own. Two things are added: its metadata
builder remembers what it built from, so that a sub-batch can be built later; and its
implementation lets the treatment of a layer, if it has one, decide what is computed of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend

from attncache_vllm.engine import compat

Exact = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, torch.Tensor], None]


class ScoresTreatment(Protocol):
    """What runs in place of the standard backend's attention: reuse or recording.

    Found as ``attncache_scores`` on vLLM's ``Attention`` layer.
    """

    def attend(
        self,
        exact: Exact,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """Write the heads' outputs ``[T, H, d]`` of a batch.

        ``exact(query, key, value, attn_metadata, output)`` is the standard backend; query is
        ``[T, H, d]``, key and value ``[T, KV, d]``.
        """


class AttnCacheBackend(AttentionBackend):
    """Stands for the name ``attncache``; engines get :func:`wrap_backend`'s subclass instead."""


def wrap_backend(standard_path: str) -> str:
    """Subclass the backend at ``standard_path`` and return the path of the subclass."""
    wrapped = _wrap(resolve_obj_by_qualname(standard_path))
    # vLLM resolves backends by path; a class made at run time needs a name in a module.
    globals()[wrapped.__name__] = wrapped
    return f"{__name__}.{wrapped.__name__}"


@functools.cache
def _wrap(standard: type[AttentionBackend]) -> type[AttentionBackend]:
    builder_cls = _observing_builder(standard.get_builder_cls())
    impl_cls = _treatable_impl(standard.get_impl_cls())
    return type(
        "AttnCache" + standard.__name__,
        (standard,),
        {
            "__module__": __name__,
            "get_builder_cls": staticmethod(lambda: builder_cls),
            "get_impl_cls": staticmethod(lambda: impl_cls),
        },
    )


def _observing_builder(standard: type) -> type:
    class ObservingMetadataBuilder(standard):
        # vLLM would derive the metadata of a second KV cache group from that of the first without
        # a call of build(): it would then remember the wrong group's block table.
        supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: Any,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)
            self._count_bypass = compat.bypass_counter(vllm_config, layer_names)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            built = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            prompts = compat.prompts(common_attn_metadata.num_reqs)
            source = compat.MetadataSource(self, common_attn_metadata, prompts)
            compat.remember_source(built, source)
            if self._count_bypass is not None:
                self._count_bypass(source)
            return built

    return ObservingMetadataBuilder


def _treatable_impl(standard: Any) -> type:
    class TreatableAttentionImpl(standard):
        asks_treatment = True

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: Any,
            attn_metadata: Any,
            output: torch.Tensor,
            *scales: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            def exact(
                q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: Any, out: torch.Tensor
            ) -> None:
                standard.forward(self, layer, q, k, v, kv_cache, metadata, out, *scales, **kwargs)

            treatment: ScoresTreatment | None = getattr(layer, "attncache_scores", None)
            if treatment is None or attn_metadata is None:  # None while vLLM profiles
                exact(query, key, value, attn_metadata, output)
            else:
                treatment.attend(exact, query, key, value, attn_metadata, output)
            return output

    return TreatableAttentionImpl
