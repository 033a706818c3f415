# SPDX-License-Identifier: Apache-2.0
"""Looks into vLLM's worker (``worker_extension_cls``), called by ``Engine.probe``."""

from __future__ import annotations

import sys
from typing import Any

PATH = "integration_tests.probe.Probe"


class Probe:
    """Methods added to the worker; the names carry a prefix because they share its namespace."""

    def probe_attention(self: Any) -> list[dict[str, Any]]:
        """For each attention layer of the model: the classes in force and what was changed."""
        from vllm.model_executor.layers.attention import Attention

        found = []
        for module in self.get_model().modules():
            attention = getattr(module, "attn", None)
            if not isinstance(attention, Attention):
                continue
            layers = (module, attention)
            parts = (*layers, attention.impl)
            found.append(
                {
                    "classes": [_path(type(part)) for part in parts],
                    "backend": _path(attention.get_attn_backend()),
                    "builder": _path(attention.get_attn_backend().get_builder_cls()),
                    "forward_replaced": any("forward" in vars(part) for part in layers),
                    "attributes": [name for name in vars(attention) if "attncache" in name],
                }
            )
        return found

    def probe_modules(self: Any) -> list[str]:
        """Modules of the plugin that this process has loaded."""
        return sorted(name for name in sys.modules if name.startswith("attncache_vllm."))

    def probe_counters(self: Any) -> dict[str, float]:
        """The plugin's metrics in this process, as ``name{label values}``."""
        from prometheus_client import REGISTRY

        return {
            f"{sample.name}{{{', '.join(sample.labels.values())}}}": sample.value
            for metric in REGISTRY.collect()
            if metric.name.startswith("attncache")
            for sample in metric.samples
        }


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
