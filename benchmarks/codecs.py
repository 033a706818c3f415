# SPDX-License-Identifier: Apache-2.0
"""What a map takes in each encoding, how long its product with the values takes, and how much of
the answer it keeps: ``python -m benchmarks.codecs``. Writes ``codecs.json`` below ``--out``.

Maps and values are the model's own, of news cut at each length, computed by transformers in
float32; some layers stand for all. The baseline is the dense square in bfloat16, the heads of a KV
group folded into the rows of one product. Forms take turns on one thread, and an error is that of a
row's heads against float32, relative, as a mean over rows: that of the baseline is bfloat16's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from attncache_vllm.reuse.apply import apply_map
from attncache_vllm.reuse.codecs import CODECS
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import AttentionMap
from attncache_vllm.reuse.tiles import TiledMap
from benchmarks.assets import ensure
from benchmarks.corpus import news

LAYERS = (2, 10, 20, 29)
# Shares of a row, beside its largest probability, that tiles may lose; 0 is as they are stored.
DROPPED = (0.0, 0.02, 0.05, 0.1, 0.2)
BUDGET_SECONDS = 3.0
Form = Callable[[Tensor, Tensor], object]
console = Console(width=120)  # as wide as the table has to be, in a log as well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="128,512,1024,2048,4096", help="tokens, with commas")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # what a model's worker has beside other heads is not asked here
    rows = []
    for length in map(int, options.lengths.split(",")):
        for layer, (probs, value) in own_maps(length).items():
            rows += [{"length": length, "layer": layer, **row} for row in measure(probs, value)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "codecs.json").write_text(json.dumps(rows, indent=2) + "\n")
    show(rows)


@torch.inference_mode()
def own_maps(length: int) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer the map ``[H, length, length]`` float32 and the values ``[length, KV, d]`` bfloat16
    of a text."""
    folder = ensure("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(news(200)), return_tensors="pt").input_ids[:, :length]
    size = model.config.hidden_size // model.config.num_attention_heads
    maps: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for layer in LAYERS:
        attention = model.model.layers[layer].self_attn
        attention.register_forward_hook(
            lambda module, given, found, layer=layer: maps.update({layer: found[1][0]})
        )
        attention.v_proj.register_forward_hook(
            lambda module, given, found, layer=layer: values.update(
                {layer: found[0].view(length, -1, size).bfloat16()}
            )
        )
    model.model(ids, use_cache=False)
    return {layer: (maps[layer], values[layer]) for layer in LAYERS}


@torch.inference_mode()
def measure(probs: Tensor, value: Tensor) -> list[dict[str, Any]]:
    """A row for each form of one map."""
    heads, length, _ = probs.shape
    layout = MapLayout(heads, value.shape[1], Mask(causal=True))
    exact = product_of(probs, value.float(), layout)
    dense = probs.bfloat16()
    forms: dict[str, Form] = {
        "dense, bf16": lambda value, out: out.copy_(product_of(dense, value, layout))
    }
    sizes = {"dense, bf16": dense.nbytes}
    stored: dict[str, AttentionMap] = {}
    no_scores = torch.zeros(heads, length)
    for name, codec in CODECS.items():
        encoded = codec.encode(probs, no_scores, layout.mask)
        decoded = codec.decode(encoded, layout, length, None)
        sizes[name] = encoded.nbytes
        stored[name] = decoded
        if isinstance(decoded, TiledMap):
            for share in DROPPED[1:]:
                lost = f"{name}, {share:.0%} lost"
                stored[lost] = decoded.pruned(share)
                sizes[lost] = stored[lost].nbytes
    forms |= {name: partial(apply_map, found) for name, found in stored.items()}
    out = torch.empty(length, heads * value.shape[2], dtype=torch.bfloat16)
    seconds = timed(forms, value, out)
    rows = []
    for name, form in forms.items():
        form(value, out)
        rows.append(
            {
                "form": name,
                "share_of_dense": round(sizes[name] / dense.nbytes, 4),
                "ms": round(seconds[name] * 1e3, 3),
                "speedup": round(seconds["dense, bf16"] / seconds[name], 3),
                "error": round(error_of(out.float(), exact), 5),
            }
        )
    return rows


def product_of(probs: Tensor, value: Tensor, layout: MapLayout) -> Tensor:
    """``[L, H * d]`` of a dense map and values of one dtype, no value repeated."""
    length = probs.shape[1]
    folded = probs.view(layout.num_kv_heads, layout.group * length, length)
    product = torch.bmm(folded, value.transpose(0, 1))
    return product.view(layout.num_heads, length, -1).transpose(0, 1).flatten(1)


def timed(forms: dict[str, Form], value: Tensor, out: Tensor) -> dict[str, float]:
    """Median seconds of each form; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    started = time.monotonic()
    while time.monotonic() - started < BUDGET_SECONDS or len(seconds["dense, bf16"]) < 6:
        for name, form in forms.items():
            begun = time.perf_counter()
            form(value, out)
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def error_of(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).mean())


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="one thread; ranges over layers")
    for header in ("tokens", "form", "share of dense", "speed-up", "error"):
        table.add_column(header)
    for length, form in dict.fromkeys((row["length"], row["form"]) for row in rows):
        of = [row for row in rows if (row["length"], row["form"]) == (length, form)]
        cells = (
            f"{min(row[key] for row in of):.3f} to {max(row[key] for row in of):.3f}"
            for key in ("share_of_dense", "speedup", "error")
        )
        table.add_row(str(length), form, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
