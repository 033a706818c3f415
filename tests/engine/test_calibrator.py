# SPDX-License-Identifier: Apache-2.0
"""The worker's side of calibration: what it serves, fits and measures is what serving would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from attention_samples import Row, step_of
from calibration_samples import CHEAP, LAYERS, SmallModel, Tokens, sample_text, sample_texts, shape
from map_samples import product
from torch import Tensor

from attncache_vllm.engine import calibrate
from attncache_vllm.engine.calibrate import HELD_OUT_EVERY, READ_COUNT, RIDGE, HitOf
from attncache_vllm.engine.canary import relative_error
from attncache_vllm.engine.step import Hit, Served
from attncache_vllm.engine.step import Sequence as EngineRow
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.reuse.codec import decode_map, encode_map
from attncache_vllm.reuse.correct import FitSums
from attncache_vllm.reuse.maps import RowBlocks

DEAR = 2


class Maps(dict[int, list[Tensor]]):
    """Keeps the maps that it is given to sum."""

    def add(self, layer: int, probs: Tensor) -> None:
        self.setdefault(layer, []).append(probs)


@pytest.fixture(scope="module")
def model() -> SmallModel:
    return SmallModel()


@pytest.fixture(scope="module")
def stock() -> SmallModel:
    """The same model without a calibrator."""
    return SmallModel(calibrated=False)


def maps_of(
    model: SmallModel, tokens: Tokens, layer: int, groups: tuple[int, ...] | None = None
) -> RowBlocks:
    probs, lse = model.maps(tokens)[layer]
    layout = model.calibrator.layouts[layer]
    return decode_map(encode_map(probs, lse, layout.mask), layout, len(tokens), groups)


def hits(served: dict[int, RowBlocks], only: Sequence[Tokens] | None = None) -> HitOf:
    """These maps for every text, or for some."""
    wanted = None if only is None else {ids.tobytes() for ids in only}
    hit = Hit("template", {layer: Served("template", maps) for layer, maps in served.items()})

    def hit_of(row: EngineRow) -> Hit | None:
        assert row.token_ids is not None
        return hit if wanted is None or row.token_ids.tobytes() in wanted else None

    return hit_of


OTHER = sample_text(99, 24)
TEXTS = sample_texts(0, 10)


# -- serving -----------------------------------------------------------------------------------


def test_nothing_is_reused_until_the_driver_says_so(model: SmallModel, stock: SmallModel) -> None:
    assert torch.equal(model.run(TEXTS), stock.run(TEXTS))
    with model.calibrator.serving(hits({DEAR: maps_of(model, OTHER, DEAR)})):
        assert not torch.equal(model.run(TEXTS), stock.run(TEXTS))
    assert torch.equal(model.run(TEXTS), stock.run(TEXTS))


def test_only_the_texts_that_are_hits_are_served(model: SmallModel, stock: SmallModel) -> None:
    with model.calibrator.serving(hits({DEAR: maps_of(model, OTHER, DEAR)}, TEXTS[2:4])):
        changed = (model.run(TEXTS) != stock.run(TEXTS)).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 3]


def test_a_text_is_answered_as_ever_from_its_own_maps(model: SmallModel, stock: SmallModel) -> None:
    tokens = TEXTS[0]
    own = {layer: maps_of(model, tokens, layer) for layer in range(LAYERS)}
    with model.calibrator.serving(hits(own)):
        torch.testing.assert_close(
            model.run([tokens]), stock.run([tokens]), atol=0.02, rtol=0.02
        )  # maps are kept in bf16


def test_a_part_of_a_prompt_is_refused(model: SmallModel) -> None:
    (row,) = model.rows(TEXTS[:1])
    attention = model.model.model.layers[0].self_attn
    part = Row(row.text, 0, len(row.text) - 1, row.ids)
    with (
        step_of([attention.attn], [part]) as metadata,
        pytest.raises(AttnCacheError, match="takes whole sequences, got 0 of 1"),
    ):
        attention(positions=metadata.common.positions, hidden_states=row.text[:-1])


# -- templates ---------------------------------------------------------------------------------


def test_the_maps_of_every_sequence_are_added_once_in_every_layer(model: SmallModel) -> None:
    found = Maps()
    with model.calibrator.summing(found):  # type: ignore[arg-type]
        model.run(TEXTS)
    model.run(TEXTS)  # no longer
    assert found.keys() == set(range(LAYERS))
    for number, tokens in enumerate(TEXTS):
        for layer, (probs, _) in model.maps(tokens).items():
            torch.testing.assert_close(found[layer][number], probs, atol=1e-4, rtol=1e-3)
    assert {len(maps) for maps in found.values()} == {len(TEXTS)}


# -- errors ------------------------------------------------------------------------------------


def test_errors_are_those_of_the_served_heads_on_exact_inputs(
    model: SmallModel, stock: SmallModel
) -> None:
    tokens, groups = TEXTS[0], (0, 2)
    served = maps_of(model, OTHER, 0, groups)
    with model.calibrator.comparing(hits({0: served})) as errors:
        answer = model.run([tokens])
    assert torch.equal(answer, stock.run([tokens])), "canaries are answered exactly"
    # By hand: the heads of the first layer from the one map and from the other.
    (row,) = model.rows([tokens])
    module = model.model.model.layers[0].self_attn
    _, _, value = module.heads(row.text, torch.arange(len(tokens)))
    exact = product(model.maps(tokens)[0][0], value)
    reused = product(model.maps(OTHER)[0][0][:, : len(tokens), : len(tokens)], value)
    size = shape().head_size
    columns = [head * size + at for head in (0, 1, 4, 5) for at in range(size)]
    by_hand = relative_error(reused[:, columns], exact[:, columns])
    assert errors.keys() == {0}
    # With heads that are not served it would be more than half a percent off.
    assert errors[0] == pytest.approx([by_hand], rel=2e-3)


def test_errors_of_a_layer_do_not_depend_on_what_serves_the_others(model: SmallModel) -> None:
    every = {layer: maps_of(model, OTHER, layer) for layer in range(LAYERS)}
    with model.calibrator.comparing(hits(every)) as together:
        model.run(TEXTS)
    with model.calibrator.comparing(hits({DEAR: every[DEAR]})) as alone:
        model.run(TEXTS)
    assert together.keys() == set(range(LAYERS))
    assert len(alone[DEAR]) == len(TEXTS)
    assert together[DEAR] == alone[DEAR]


# -- corrections -------------------------------------------------------------------------------


def fit(
    model: SmallModel,
    texts: Sequence[Tokens],
    exact: Tensor,
    reused: Tensor,
    groups: tuple[int, ...] = (0, 1, 2),
    only: Sequence[Tokens] | None = None,
) -> None:
    """Fit layer 0 in a step whose heads' outputs ``[T, H, d]`` are ``reused`` where they were
    ``exact``; ``reused`` is corrected as the layer corrects its output."""
    calibrator, value = model.calibrator, values_of(texts)
    rows = model.rows(texts)
    hit_of = hits({0: maps_of(model, OTHER, 0, groups)}, only)
    with step_of([model.model.model.layers[0].self_attn.attn], rows):
        with calibrator.keeping():
            calibrator.observe(rows[0].text)
            calibrator.after(0, value, exact)
        with calibrator.fitting("template", hit_of):
            calibrator.observe(rows[0].text)
            calibrator.after(0, value, reused)


def heads_of(texts: Sequence[Tokens], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(map(len, texts)), 6, shape().head_size, generator=generator)


def values_of(texts: Sequence[Tokens]) -> Tensor:
    return heads_of(texts, seed=1)[:, :3]


def spans(texts: Sequence[Tokens]) -> Iterator[slice]:
    start = 0
    for ids in texts:
        yield slice(start, start + len(ids))
        start += len(ids)


def test_what_is_linear_is_taken_back_of_the_served_heads() -> None:
    model = SmallModel()
    reused, size = heads_of(TEXTS), shape().head_size
    # Each head lacks something of the one before it, of its own values, and what all tokens lack.
    own = values_of(TEXTS).repeat_interleave(2, dim=1)
    shift = torch.linspace(-1, 1, 6 * size).view(6, size)
    exact = reused + 0.5 * reused.roll(1, dims=1) + 0.5 * own + shift
    corrected = reused.clone()
    fit(model, TEXTS, exact, corrected, groups=(1,))
    before, after = model.calibrator.gains[0]
    assert after < 0.1 * before
    assert model.calibrator.corrections[0]["template"].heads == (2, 3)
    # The layers that follow see the corrected outputs; heads that are exact stay as they are.
    torch.testing.assert_close(corrected[:, 2:4], exact[:, 2:4], atol=0.1, rtol=0.1)
    assert torch.equal(corrected[:, :2], reused[:, :2])
    assert torch.equal(corrected[:, 4:], reused[:, 4:])


@pytest.mark.parametrize("read_row", [None, 0, -1])
def test_a_correction_that_helps_texts_it_does_not_know_is_fitted_to_all_of_them(
    read_row: int | None,
) -> None:
    model = SmallModel(read_row=read_row)
    reused, value = heads_of(TEXTS), values_of(TEXTS)
    exact = reused + 0.5 * reused.roll(1, dims=1) + 0.3 * heads_of(TEXTS, seed=2)
    counts = torch.ones(len(reused))
    if read_row is not None:
        for span in spans(TEXTS):
            counts[range(span.start, span.stop)[read_row]] = READ_COUNT
    expected = FitSums.of(
        reused.flatten(1), value, exact.flatten(1), counts, tuple(range(6)), shape().head_size
    ).solve(RIDGE)
    fit(model, TEXTS, exact, reused.clone())
    kept = model.calibrator.corrections[0]["template"]
    torch.testing.assert_close(kept.weight, expected.weight)
    torch.testing.assert_close(kept.bias, expected.bias)


def test_a_correction_that_does_not_help_texts_it_was_not_fitted_on_is_dropped() -> None:
    model = SmallModel()
    reused = heads_of(TEXTS)
    exact = reused + 1.0
    for number, span in enumerate(spans(TEXTS)):
        if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
            exact[span] = reused[span] + 1e-3
    answered = reused.clone()
    fit(model, TEXTS, exact, answered)
    before, after = model.calibrator.gains[0]
    assert after > before
    assert model.calibrator.corrections[0] == {}
    assert torch.equal(answered, reused)


def test_without_texts_to_hold_out_no_correction_is_kept() -> None:
    model = SmallModel()
    few = TEXTS[: HELD_OUT_EVERY - 1]
    fit(model, few, heads_of(few) + 1, heads_of(few))
    assert model.calibrator.corrections[0] == {}


def test_texts_that_nothing_serves_take_no_part_in_a_fit() -> None:
    model = SmallModel()
    served = TEXTS[::2]
    reused = heads_of(TEXTS)
    exact = reused.clone()
    for number, span in enumerate(spans(TEXTS)):
        exact[span] += 1.0 if number % 2 == 0 else 0.0
    answered = reused.clone()
    fit(model, TEXTS, exact, answered, only=served)
    assert "template" in model.calibrator.corrections[0]
    torch.testing.assert_close(answered, exact, atol=0.1, rtol=0.1)
    for number, span in enumerate(spans(TEXTS)):
        assert torch.equal(answered[span], reused[span]) == (number % 2 == 1)


def test_a_fitted_layer_serves_corrected_and_a_new_fit_begins_without() -> None:
    model = SmallModel()
    texts = sample_texts(20, 25)
    exact = model.states(texts)
    served = hits({DEAR: maps_of(model, OTHER, DEAR), **{0: maps_of(model, OTHER, 0)}})
    calibrator = model.calibrator

    def damage() -> float:
        return relative_error(model.states(texts), exact)

    with calibrator.serving(served):
        raw = damage()
    with calibrator.keeping():
        model.run(texts)
    with calibrator.fitting("template", served):
        fitted = damage()
    assert {layer for layer, of_layer in calibrator.corrections.items() if of_layer} == {0, DEAR}
    with calibrator.serving(served):
        corrected = damage()
    assert corrected < raw
    # What was fitted on is what is served: the layers after a corrected one saw it corrected.
    assert corrected == pytest.approx(fitted, rel=0.05)
    both = calibrator.fitted("template")
    only_first = hits({0: maps_of(model, OTHER, 0)})
    with calibrator.fitting("template", only_first):
        model.run(texts)
    assert {layer for layer, of_layer in calibrator.corrections.items() if of_layer} == {0}
    calibrator.correct("template", both)
    with calibrator.serving(served):
        assert damage() == corrected


def test_corrections_are_fitted_on_one_step_and_the_same_one(model: SmallModel) -> None:
    served = hits({0: maps_of(model, OTHER, 0)})
    with (
        model.calibrator.keeping(),
        pytest.raises(AttnCacheError, match="must fit one step"),
    ):
        model.run(TEXTS[:1])
        model.run(TEXTS[1:2])
    with model.calibrator.keeping():
        model.run(TEXTS)
    with (
        model.calibrator.fitting("template", served),
        pytest.raises(AttnCacheError, match="on the step whose exact outputs were kept"),
    ):
        model.run(TEXTS[:-1])
    # None of it is left behind.
    with model.calibrator.serving(hits({}, [])):
        model.run(TEXTS)


# -- which calibrator --------------------------------------------------------------------------


def test_the_driver_finds_the_calibrator_of_its_engine(
    monkeypatch: pytest.MonkeyPatch, model: SmallModel
) -> None:
    monkeypatch.setattr(calibrate, "_active", None)
    with pytest.raises(AttnCacheError, match="nothing is being calibrated"):
        calibrate.active()
    calibrate.activate(model.calibrator)
    assert calibrate.active() is model.calibrator


def test_the_sample_model_has_cheap_layers_and_dear_ones(model: SmallModel) -> None:
    # What tests of choosing rely on.
    exact = model.run(TEXTS)
    damages = {}
    for layer in range(LAYERS):
        with model.calibrator.serving(hits({layer: maps_of(model, OTHER, layer)})):
            damages[layer] = float((model.run(TEXTS) - exact).norm())
    cheap = max(damages[layer] for layer in CHEAP)
    assert all(damages[layer] > 10 * cheap for layer in range(LAYERS) if layer not in CHEAP)
    assert np.isfinite(list(damages.values())).all()
