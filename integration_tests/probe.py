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

    def probe_num_layers(self: Any) -> int:
        """Number of layers of the model."""
        return int(self.model_config.hf_text_config.num_hidden_layers)

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

    def probe_layers(self: Any) -> dict[str, int]:
        """Numbers of layers by treatment, of the engine that started last in this process."""
        prefix = "attncache_layers{"
        return {
            name.removeprefix(prefix).removesuffix("}"): int(value)
            for name, value in Probe.probe_counters(self).items()
            if name.startswith(prefix)
        }

    def probe_forget_layers(self: Any) -> None:
        """Forget them, before another engine starts in this process."""
        from attncache_vllm.engine import metrics

        metrics.LAYERS.clear()


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
