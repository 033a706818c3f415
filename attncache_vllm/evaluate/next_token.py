# SPDX-License-Identifier: Apache-2.0
"""The distribution of the token after a prompt, from an embedding endpoint.

vLLM's models end in their final norm, and an embedding model's pooler takes what comes after it. So
the unnormalised embedding of the last token, times the output embeddings, are the logits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from attncache_vllm.errors import SettingsError

BATCH = 16  # prompts of which the logits over the whole vocabulary are held at once
# Names of the output embeddings in checkpoints, and of the input embeddings where both are one.
OUTPUT = ("lm_head.weight", "embed_out.weight")
TIED = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
# What some architectures do to logits afterwards.
RESCALING = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def model_folder(model: str) -> Path:
    """The folder of a model given as a folder or as a hub name (fetched where it is not cached)."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))


def output_embeddings(folder: Path) -> Tensor:
    """float32 ``[vocabulary, D]`` from the safetensors files of a model's folder.

    Raises:
        SettingsError: there are none, or the model does more to its logits.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    if rescaling := [key for key in RESCALING if config.get(key) not in (None, 1, 1.0)]:
        raise SettingsError(
            f"prompts need logits that are hidden states times output embeddings, got a model with "
            f"{', '.join(rescaling)}; evaluate it on texts, pairs or labels"
        )
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    # A tied model may carry a copy under the output's name; it is the same.
    wanted = OUTPUT + (TIED if config.get("tie_word_embeddings", True) else ())
    for ending in wanted:
        for name, file in found.items():
            if name.endswith(ending):
                with safe_open(file, framework="pt") as tensors:
                    weight: Tensor = tensors.get_tensor(name)
                return weight.float()
    raise SettingsError(
        f"prompts need the output embeddings, one of {', '.join(wanted)} in safetensors files, got "
        f"{len(files)} files in {str(folder)!r} without them"
    )


def compare(
    exact: Tensor, reused: Tensor, weight: Tensor, choices: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """What reuse does to the next token.

    Args:
        exact, reused: unnormalised last-token embeddings ``[N, D]``.
        weight: output embeddings ``[V, D]``, V at least the vocabulary.
        choices: for each prompt the tokens to choose among.

    Returns:
        KL(exact || reused) in nats over the whole vocabulary, float64 ``[N]``, and the number of
        the likeliest choice by either, int64 ``[N]``.

    Raises:
        SettingsError: the embeddings are not of the width of the output embeddings.
    """
    if exact.shape[1] != weight.shape[1]:
        raise SettingsError(
            f"embeddings must have the width of the output embeddings, {weight.shape[1]}, got "
            f"{exact.shape[1]}; serve the model without a projection after pooling"
        )
    divergences, chosen, chosen_reused = [], [], []
    for start in range(0, len(exact), BATCH):
        batch = slice(start, start + BATCH)
        p, q = (
            (side[batch].float() @ weight.T).double().log_softmax(-1) for side in (exact, reused)
        )
        divergences.append((p.exp() * (p - q)).sum(-1))
        for row, tokens in enumerate(choices[batch]):
            chosen.append(p[row, list(tokens)].argmax())
            chosen_reused.append(q[row, list(tokens)].argmax())
    return torch.cat(divergences), torch.stack(chosen), torch.stack(chosen_reused)


def choice_tokens(tokenizer: Any, choices: Sequence[str]) -> list[int]:
    """The first token of each choice, by which a choice is told from the others.

    Raises:
        SettingsError: two choices begin with the same token, or one is empty.
    """
    firsts = [tokenizer(choice, add_special_tokens=False).input_ids[:1] for choice in choices]
    tokens = [token for first in firsts for token in first]
    if len(set(tokens)) < len(choices):
        raise SettingsError(
            "the choices of a prompt must begin with different tokens, got "
            f"{list(choices)!r}; name them by letters"
        )
    return tokens
