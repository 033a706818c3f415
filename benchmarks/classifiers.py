# SPDX-License-Identifier: Apache-2.0
"""Real small classifiers, made on the spot: a linear head on the states of a frozen model.

No package holds a classifier small enough for two cores, and a random head would hide damage: its
answers mean nothing. A head fitted to a few hundred labelled texts takes half a minute, and its
accuracy is a figure that reuse can lose.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attncache_vllm.calibrate.fidelity import spearman
from attncache_vllm.evaluate.probe import logistic
from benchmarks.assets import ensure
from benchmarks.corpus import stsb_pairs

MAX_TOKENS = 128
BATCH = 64
console = Console(stderr=True)


class Review(NamedTuple):
    """A sentence of a film review; label 1 is positive, 0 negative."""

    text: str
    label: int


def reviews(limit: int, seed: int = 0) -> list[Review]:
    """Draw ``limit`` reviews; a smaller ``limit`` with the same ``seed`` gives the beginning."""
    with ensure("reviews").open(encoding="utf-8") as lines:
        drawn = [Review(**json.loads(line)) for line in lines]
    random.Random(seed).shuffle(drawn)
    return drawn[:limit]


def review_classifier(
    target: Path, train: int = 500, held_out: int = 300, seed: int = 0
) -> dict[str, Any]:
    """Save SmolLM2 as a classifier of film reviews: 0 negative, 1 positive.

    ``vllm serve TARGET --runner pooling`` answers /classify with it. The head is a logistic probe
    without intercept, since ``LlamaForSequenceClassification`` has none, on the final state of the
    last token.

    Args:
        target: folder to write, as transformers saves a model with its tokenizer.
        train: the head is fitted to so many of ``reviews``, the first ones.
        held_out: its accuracy is taken on so many that follow.
        seed: chooses the reviews.

    Returns:
        ``train``, ``held_out``, ``accuracy`` and ``majority``, the accuracy of always giving the
        more frequent answer.
    """
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    drawn = reviews(train + held_out, seed)
    labels = torch.tensor([review.label for review in drawn])
    tokenizer = AutoTokenizer.from_pretrained(ensure("smollm2"))
    model = LlamaForSequenceClassification.from_pretrained(
        ensure("smollm2"),
        dtype=torch.bfloat16,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    ).eval()
    states = _states(model.model, tokenizer, [(review.text,) for review in drawn], token=-1)
    spread = states[:train].std(0)
    weight = logistic(states[:train] / spread, labels[:train], penalty=0.1).float() / spread
    with torch.no_grad():
        model.score.weight.copy_(torch.stack([-weight, weight]) / 2)
        logits = F.linear(states[train:], model.score.weight.float())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    positive = labels[train:].double().mean().item()
    return {
        "train": train,
        "held_out": held_out,
        "accuracy": (logits.argmax(1) == labels[train:]).double().mean().item(),
        "majority": max(positive, 1 - positive),
    }


def pair_scorer(
    target: Path, train: int = 1500, held_out: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Save MiniLM as a cross-encoder that scores how alike two sentences are, from 0 to 1.

    ``vllm serve TARGET --runner pooling`` answers /score and /rerank with it. MiniLM was trained
    on single sentences and is not changed here, so this is a poor scorer, though far from chance:
    embed both sentences instead if the score matters.

    ``BertForSequenceClassification`` has the head ``classifier(tanh(dense(CLS)))``. Dense becomes a
    standardisation to a quarter of a standard deviation, where tanh is nearly linear, and the
    classifier a logistic probe with people's scores as soft labels.

    Args:
        target: folder to write, as transformers saves a model with its tokenizer.
        train: so many pairs of the STS benchmark's training split the head is fitted to.
        held_out: on so many of its dev split Spearman's correlation is taken.
        seed: chooses the pairs.

    Returns:
        ``train``, ``held_out`` and ``spearman``.
    """
    from transformers import AutoTokenizer, BertForSequenceClassification

    draw = random.Random(seed)
    pairs = draw.sample(stsb_pairs("train"), train) + draw.sample(stsb_pairs("dev"), held_out)
    scores = torch.tensor([pair.score / 5 for pair in pairs])
    tokenizer = AutoTokenizer.from_pretrained(ensure("minilm"))
    model = BertForSequenceClassification.from_pretrained(
        ensure("minilm"), dtype=torch.bfloat16, num_labels=1
    ).eval()
    states = _states(model.bert, tokenizer, [(pair.first, pair.second) for pair in pairs], token=0)
    scale = 1 / (4 * states[:train].std(0))
    dense = model.bert.pooler.dense
    with torch.no_grad():
        dense.weight.copy_(torch.diag(scale))
        dense.bias.copy_(-scale * states[:train].mean(0))
        pooled = torch.tanh(F.linear(states, dense.weight.float(), dense.bias.float()))
        # A last column of ones: its weight is the classifier's bias.
        inputs = F.pad(pooled[:train], (0, 1), value=1.0)
        weight = logistic(inputs, scores[:train], penalty=1e-3).float()
        model.classifier.weight.copy_(weight[None, :-1])
        model.classifier.bias.copy_(weight[-1:])
        logits = F.linear(pooled[train:], model.classifier.weight.float())[:, 0]
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {"train": train, "held_out": held_out, "spearman": spearman(logits, scores[train:])}


def _states(model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]], token: int) -> Tensor:
    """Final states ``[N, hidden]`` float32 of each text's first (``token`` 0) or last (-1) token.

    A text is a tuple of one or two strings; two are joined as the tokenizer joins a pair.
    """
    # Texts of like length together: padding is computed, too.
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    states = torch.empty(len(texts), model.config.hidden_size)
    with torch.inference_mode():
        for batch in track(batches, description=type(model).__name__, console=console):
            encoded = tokenizer(
                *zip(*(texts[i] for i in batch), strict=True),
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = model(**encoded).last_hidden_state
            position = token % encoded["attention_mask"].sum(1)
            states[batch] = hidden[torch.arange(len(batch)), position].float()
    return states
