# SPDX-License-Identifier: Apache-2.0
"""A model of a few attention layers that is calibrated without an engine: the calibrator and the
layers are the real ones, the forward pass around them is that of ``attention_samples``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from attention_samples import Row, Shape, make_model, run_model, whole
from map_samples import product
from numpy.typing import NDArray
from store_samples import NAMESPACE, make_features
from torch import Tensor

from attncache_vllm.calibrate.saving import SavingModel
from attncache_vllm.engine import ops
from attncache_vllm.engine.calibrate import CalibrateScores, Calibrator
from attncache_vllm.engine.modules import find_attention_modules
from attncache_vllm.reuse.apply import exact_map
from attncache_vllm.reuse.codec import CODEC, encode_map
from attncache_vllm.reuse.feature import Projector, pool_tokens
from attncache_vllm.reuse.layout import Mask
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.store import LocalStore, Record, token_hash

LAYERS = 4
WORDS = 40
# Layers of which a reused map changes next to nothing.
CHEAP = (1, 3)
# As many rows as the KV cache of ``attention_samples`` has blocks for.
ROWS = 30

Tokens = NDArray[np.int32]


def shape(causal: bool = True) -> Shape:
    return Shape(heads=6, kv_heads=3, head_size=8, hidden=48, causal=causal)


def sample_text(number: int, length: int = 24) -> Tokens:
    """Token ids of a text; a function of its number."""
    return np.random.default_rng(number).integers(0, WORDS, length).astype(np.int32)


def sample_texts(first: int, count: int) -> list[Tokens]:
    """Texts of 18 to 24 tokens."""
    return [sample_text(number, 18 + number % 7) for number in range(first, first + count)]


class SmallModel:
    """Stands in for ``CalibratedModel``; the answer to a text is the mean of its last states."""

    def __init__(
        self, causal: bool = True, calibrated: bool = True, read_row: int | None = None
    ) -> None:
        self.max_tokens = 64
        self.runs = 0
        self.closed = False
        of_layer = shape(causal)
        self.model = make_model(LAYERS, of_layer)
        for layer in range(LAYERS):
            output = self.model.model.layers[layer].self_attn.o_proj
            output.weight.data *= 1e-3 if layer in CHEAP else 1.0
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.randn(WORDS, of_layer.hidden, generator=generator)
        self.config = SimpleNamespace(
            get_hidden_size=lambda: of_layer.hidden,
            get_head_size=lambda: of_layer.head_size,
            dtype=torch.float32,
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS),
        )
        if not calibrated:
            return
        found = find_attention_modules(self.model)
        self.calibrator = Calibrator(found[0].name, found, read_row)
        for item in found:
            item.attention.attncache_scores = CalibrateScores(item, self.calibrator)
        ops.observe_input(found[0], self.calibrator.observe)

    def rows(self, texts: Sequence[Tokens]) -> list[Row]:
        return [whole(self.embedding[torch.from_numpy(ids).long()], ids) for ids in texts]

    def states(self, texts: Sequence[Tokens]) -> Tensor:
        """Last states ``[T, hidden]`` of texts that make one step."""
        return run_model(self.model, self.rows(texts))

    def run(self, texts: Sequence[Tokens]) -> Tensor:
        assert all(len(ids) <= self.max_tokens for ids in texts)
        self.runs += 1
        answers: list[Tensor] = []
        for start in range(0, len(texts), ROWS):
            step = texts[start : start + ROWS]
            parts = self.states(step).split([len(ids) for ids in step])
            answers += [part.mean(0) for part in parts]
        return torch.stack(answers)

    def tokenize(self, text: str, pair: str | None, max_tokens: int) -> Tokens:
        """A text is the number of a sample."""
        return sample_text(int(text), 18 + int(text) % 7)[:max_tokens]

    def special_tokens(self) -> set[int]:
        return {0}

    def close(self) -> None:
        self.closed = True

    def saving(self) -> SavingModel:
        return SavingModel(self.calibrator.layouts, 48, 8, LAYERS, 21)

    def maps(self, tokens: Tokens) -> dict[int, tuple[Tensor, Tensor]]:
        """Probabilities ``[H, L, L]`` and log-sum-exps ``[H, L]`` by layer, found beside vLLM."""
        (row,) = self.rows([tokens])
        states, found = row.text, {}
        for layer, module in enumerate(item.self_attn for item in self.model.model.layers):
            query, key, value = module.heads(states, torch.arange(len(tokens)))
            mask = Mask(module.shape.causal)
            probs, lse = exact_map(query, key, module.shape.head_size**-0.5, mask)
            found[layer] = probs, lse
            states = states + module.o_proj(product(probs, value).float())[0]
        return found


def make_store(
    path: Path, model: SmallModel, texts: Sequence[Tokens], projector: Projector | None = None
) -> Path:
    """A published store with the maps of some texts in every layer; their features are those of
    ``projector``, or of no meaning."""
    pooled = torch.zeros(len(texts), 2, 4)
    features, data = make_features(len(texts)), b"projector"
    if projector is not None:
        pooled = torch.stack([pool_tokens(row.text, projector.slots) for row in model.rows(texts)])
        pooled = pooled.half().float()
        with torch.no_grad():
            features, data = projector(pooled).numpy(), projector.to_bytes()
    with LocalStore.create(path, NAMESPACE, {"slots": pooled.shape[1]}) as store:
        for number, ids in enumerate(texts):
            store.put(
                Record(
                    token_hash=token_hash(ids),
                    length=len(ids),
                    codec=CODEC,
                    pooled=pooled[number].numpy(),
                    maps={
                        layer: encode_map(probs, lse, model.calibrator.layouts[layer].mask).numpy()
                        for layer, (probs, lse) in model.maps(ids).items()
                    },
                    token_ids=ids,
                    sketch=sketch(ids),
                )
            )
        plan = Plan.reusing(LAYERS, 3, (LAYERS - 1,), 0.25).to_dict()
        store.publish(plan, data, {"loss": 0.5}, features)
    return path
