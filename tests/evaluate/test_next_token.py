# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from attncache_vllm.errors import SettingsError
from attncache_vllm.evaluate import next_token


def model(folder: Path, config: dict[str, Any], **tensors: Tensor) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name.replace("__", "."): tensor}, folder / f"{number}.safetensors")
    return folder


def test_output_embeddings_are_the_head_of_an_untied_model(tmp_path: Path) -> None:
    head, inputs = torch.randn(5, 3).bfloat16(), torch.randn(5, 3)
    config = {"tie_word_embeddings": False}
    folder = model(tmp_path, config, model__embed_tokens__weight=inputs, lm_head__weight=head)
    assert torch.equal(next_token.output_embeddings(folder), head.float())


def test_output_embeddings_are_the_input_embeddings_of_a_tied_model(tmp_path: Path) -> None:
    inputs = torch.randn(5, 3)
    config = {"text_config": {"tie_word_embeddings": True}}
    folder = model(tmp_path, config, other__weight=inputs + 1, model__embed_tokens__weight=inputs)
    assert torch.equal(next_token.output_embeddings(folder), inputs)


def test_an_untied_model_without_a_head_has_no_logits(tmp_path: Path) -> None:
    folder = model(tmp_path, {"tie_word_embeddings": False}, embed_tokens__weight=torch.ones(5, 3))
    with pytest.raises(SettingsError, match="output embeddings"):
        next_token.output_embeddings(folder)


def test_a_model_that_rescales_its_logits_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path, {"final_logit_softcapping": 30.0}, lm_head__weight=torch.ones(5, 3))
    with pytest.raises(SettingsError, match="final_logit_softcapping"):
        next_token.output_embeddings(folder)


def test_the_divergence_is_that_of_the_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = 2 * next_token.BATCH + 1
    exact, reused = (torch.randn(prompts, 4, generator=draw) for _ in range(2))
    weight = torch.randn(9, 4, generator=draw)
    kl, chosen, chosen_reused = next_token.compare(exact, reused, weight, [[2, 5, 7]] * prompts)
    p, q = (
        torch.distributions.Categorical(logits=side.double() @ weight.double().T)
        for side in (exact, reused)
    )
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q), atol=1e-5, rtol=1e-4)
    for found, distribution in ((chosen, p), (chosen_reused, q)):
        assert torch.equal(found, distribution.probs[:, [2, 5, 7]].argmax(1))
    same, _, _ = next_token.compare(exact, exact, weight, [[0]] * prompts)
    assert same.abs().max() < 1e-9


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(SettingsError, match="width"):
        next_token.compare(torch.ones(3, 4), torch.ones(3, 4), torch.ones(9, 5), [[0]] * 3)


def tokenizer(text: str, add_special_tokens: bool) -> SimpleNamespace:
    assert not add_special_tokens
    return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def test_a_choice_is_known_by_its_first_token() -> None:
    assert next_token.choice_tokens(tokenizer, ["Apple", "B"]) == [ord("A"), ord("B")]


@pytest.mark.parametrize("choices", [["Aa", "Ab"], ["A", ""]])
def test_choices_that_begin_alike_cannot_be_told_apart(choices: list[str]) -> None:
    with pytest.raises(SettingsError, match="different tokens"):
        next_token.choice_tokens(tokenizer, choices)
