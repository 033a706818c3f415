# SPDX-License-Identifier: Apache-2.0
"""Building a store without an engine: vLLM's ``LLM`` and its worker are stand-ins that record maps
drawn from the token ids; the store, the training and everything of ours are the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from store_samples import NAMESPACE, SHARED
from vllm.v1.engine.exceptions import EngineDeadError

from attncache_vllm.calibrate import build as building
from attncache_vllm.calibrate.build import BuildOptions, build
from attncache_vllm.calibrate.corpus import Text, token_hash
from attncache_vllm.calibrate.train import MIN_ENTRIES
from attncache_vllm.errors import AttnCacheError, SettingsError, StoreDamaged
from attncache_vllm.reuse.codec import CODEC, decode_map, encode_map
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.store import LocalStore, Record

LAYERS, LONGEST, HIDDEN = 6, 64, 8
LAYOUTS = {4: MapLayout(4, 2, Mask()), 5: MapLayout(4, 1, Mask(causal=False, window=20))}


def texts(count: int, length: int = 20) -> list[Text]:
    """Of ``length`` tokens each, one more for every third."""
    return [Text(" ".join([str(i), *["word"] * (length - 1 + i // 3)])) for i in range(count)]


def tokenize(text: str, pair: str | None, truncation: bool, max_length: int) -> Any:
    assert truncation
    words = text.split() if pair is None else [*text.split(), "SEP", *pair.split()]
    ids = [1 + int.from_bytes(word.encode()[:3], "little") for word in words]
    return SimpleNamespace(input_ids=ids[:max_length])


class FakeLLM:
    """The parts of vLLM's ``LLM`` that a build uses, with the recording worker behind it."""

    pooling_task = "embed"
    model_config = SimpleNamespace(architecture="SampleModel")

    def __init__(self, options: BuildOptions, layers: tuple[int, ...]) -> None:
        self.options, self.layers = options, layers
        exists = options.store.exists()
        self.store = (
            LocalStore.open(options.store, writable=True)
            if exists
            else LocalStore.create(options.store, NAMESPACE, {"layers": list(layers)})
        )
        self.prefilled: list[list[int]] = []
        self.flushes = 0
        self.dies_at: int | None = None
        self.stopped = False
        core = SimpleNamespace(shutdown=self.shutdown)
        self.llm_engine = SimpleNamespace(engine_core=core)

    def shutdown(self, timeout: int) -> None:
        self.stopped = True
        self.store.close()

    def get_tokenizer(self) -> Any:
        return tokenize

    def encode(self, prompts: list[Any], pooling_task: str, use_tqdm: bool) -> None:
        [prompt] = prompts
        assert pooling_task == self.pooling_task
        self.prefill(prompt["prompt_token_ids"])

    def score(
        self, text: str, pair: str, use_tqdm: bool, tokenization_kwargs: dict[str, int]
    ) -> None:
        longest = tokenization_kwargs["truncate_prompt_tokens"]
        self.prefill(tokenize(text, pair, True, longest).input_ids)

    def prefill(self, token_ids: list[int]) -> None:
        if len(self.prefilled) == self.dies_at:
            raise EngineDeadError
        self.prefilled.append(token_ids)

    def collective_rpc(
        self, method: str, timeout: int | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        return [getattr(self, method.removeprefix("attncache_"))(*args)]

    def layouts(self) -> list[tuple[int, int, int, bool, int | None]]:
        return [
            (layer, own.num_heads, own.num_kv_heads, own.mask.causal, own.mask.window)
            for layer, own in LAYOUTS.items()
            if layer in self.layers
        ]

    def stats(self) -> dict[str, Any]:
        stats = self.store.stats()
        return {"entries": stats.entries, "bytes": stats.bytes, "parity": {5: 0.001}}

    def commit(self, token_ids: list[int]) -> dict[str, Any]:
        assert token_ids == self.prefilled[-1]
        length, generator = len(token_ids), torch.Generator().manual_seed(sum(token_ids))
        maps = {}
        for layer in self.layers:
            layout = LAYOUTS[layer]
            scores = torch.randn(layout.num_heads, length, length, generator=generator)
            probs = scores.masked_fill(~layout.mask.visible(length), float("-inf")).softmax(-1)
            lse = torch.zeros(layout.num_heads, length)
            maps[layer] = encode_map(probs, lse, layout.mask).numpy()
        pooled = torch.randn(self.options.slots, HIDDEN, generator=generator).numpy()
        tokens = np.array(token_ids, np.int32)
        identity = token_hash(token_ids)
        self.store.put(Record(identity, length, CODEC, pooled, maps, tokens, sketch(tokens)))
        return self.stats()

    def flush(self) -> None:
        self.flushes += 1
        self.store.commit()

    def close(self) -> dict[str, Any]:
        stats = self.stats()
        self.store.commit()
        self.store.close()
        return stats


class Engines(list[FakeLLM]):
    """The engines that builds have started; ``prepare`` is called with each of them."""

    prepare: Callable[[FakeLLM], None] = staticmethod(lambda llm: None)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    started = Engines()

    def start(options: BuildOptions, layers: tuple[int, ...]) -> FakeLLM:
        started.append(FakeLLM(options, layers))
        started.prepare(started[-1])
        return started[-1]

    monkeypatch.setattr(building, "_recording_engine", start)
    monkeypatch.setattr(building, "_limits", lambda model: (LAYERS, LONGEST))
    return started


@pytest.fixture
def options(tmp_path: Path) -> BuildOptions:
    return BuildOptions("model", tmp_path / "store")


def lengths_in(store: Path) -> list[int]:
    with LocalStore.open(store) as opened:
        return [entry.length for entry in opened.manifest.entries]


# -- what is built -----------------------------------------------------------------------------


def test_a_build_publishes_plan_projector_and_features_of_every_text(
    engines: Engines, options: BuildOptions
) -> None:
    options = replace(options, max_distance=0.3)
    report = build(options, texts(10))
    assert (report["entries"], report["recorded"], report["skipped"]) == (10, 10, 0)
    assert (report["layers"], report["num_layers"]) == ([4, 5], LAYERS)
    assert report["parity"] == {5: 0.001}
    assert engines[0].stopped
    with LocalStore.open(options.store) as store:
        # All KV heads of the last third of the layers, of which the last has one only.
        neighbour = SourcePlan(((), (), (), (), (0, 1), (0,)), 0.3)
        assert store.plan == Plan(0, LAYERS, {"neighbour": neighbour}).to_dict()
        projector = Projector.from_bytes(store.projector_bytes)
        for entry_id, record in store.records():
            with torch.inference_mode():
                feature = projector(torch.tensor(record.pooled)[None]).numpy()
            [[nearest]] = store.lookup(
                feature,
                [(record.length, record.length)],
                tenants=SHARED,
                neighbours=1,
                deadline=np.inf,
            )
            # But for the rounding of a product of one row and of ten.
            assert (nearest.entry_id, nearest.distance < 1e-5) == (entry_id, True)
            for layer, encoded in record.maps.items():
                decode_map(torch.tensor(encoded), LAYOUTS[layer], record.length)


def test_layers_and_feature_layer_are_those_asked_for(
    engines: Engines, options: BuildOptions
) -> None:
    report = build(replace(options, layers=(5,), feature_layer=2), texts(8))
    assert engines[0].layers == (5,)
    assert report["layers"] == [5]
    with LocalStore.open(options.store) as store:
        assert store.plan == Plan.reusing(LAYERS, 1, (5,), 0.2, feature_layer=2).to_dict()


def test_entries_may_be_shorter_than_the_distance_of_the_rows_compared(
    engines: Engines, options: BuildOptions
) -> None:
    short = texts(8, length=2)
    report = build(replace(options, min_tokens=2), [*short, *texts(4, length=60)])
    assert report["entries"] == 12
    assert min(lengths_in(options.store)) == 2


# -- a store that was calibrated ---------------------------------------------------------------

CALIBRATED = Plan(0, LAYERS, {"template": SourcePlan(((), (), (0,), (), (1,), (0,)))}).to_dict()
ARTIFACTS = {"templates": b"maps", "corrections": b""}


@pytest.fixture
def calibrated(engines: Engines, options: BuildOptions) -> BuildOptions:
    """Options of a build of ten texts, after which the store was calibrated."""
    build(options, texts(10))
    with LocalStore.open(options.store, writable=True) as store:
        assert store.manifest.published is not None
        report = {**store.manifest.published.report, "calibration": {"rank": 0.99}}
        store.publish_plan(CALIBRATED, report, ARTIFACTS)
    return options


def nearest_of_all(store: LocalStore) -> list[int]:
    """For each entry, the entry that is nearest by the feature that the projector gives it."""
    projector = Projector.from_bytes(store.projector_bytes)
    pooled = torch.tensor(np.stack([record.pooled for _, record in store.records()]))
    with torch.inference_mode():
        features = projector(pooled).numpy()
    found = store.lookup(
        features,
        [(1, LONGEST)] * len(pooled),
        tenants=SHARED * len(pooled),
        neighbours=1,
        deadline=np.inf,
    )
    assert all(neighbours[0].distance < 1e-5 for neighbours in found)
    return [neighbours[0].entry_id for neighbours in found]


def test_a_build_on_a_calibrated_store_only_makes_new_texts_findable(
    engines: Engines, calibrated: BuildOptions
) -> None:
    with LocalStore.open(calibrated.store) as store:
        before = store.manifest.published
        projector = store.projector_bytes
    report = build(replace(calibrated, max_distance=0.5), texts(14))
    assert (report["entries"], report["recorded"], report["training"]) == (14, 4, None)
    assert report["layers"] == [2, 4, 5]
    with LocalStore.open(calibrated.store) as store:
        after = store.manifest.published
        assert before is not None and after is not None
        assert (after.plan, after.report) == (CALIBRATED, before.report)
        assert store.projector_bytes == projector
        assert {name: store.artifact(name) for name in after.artifacts} == ARTIFACTS
        assert nearest_of_all(store) == list(range(14))
        for entry_id, record in store.records():
            [[found]] = store.overlaps(
                [record.sketch], tenants=SHARED, neighbours=1, deadline=np.inf
            )
            assert (found.entry_id, found.common) == (entry_id, len(record.sketch))


def test_a_build_on_a_store_that_was_not_calibrated_trains_again(
    engines: Engines, options: BuildOptions
) -> None:
    build(options, texts(10))
    with LocalStore.open(options.store) as store:
        before = store.projector_bytes
    report = build(replace(options, max_distance=0.5), texts(14))
    assert report["training"]["epochs"] == building.EPOCHS
    with LocalStore.open(options.store) as store:
        assert store.projector_bytes != before
        assert Plan.from_dict(store.plan).sources["neighbour"].gate == 0.5


def harm(store: Path, kind: str) -> None:
    [file] = store.glob(f"{kind}-*")
    file.write_bytes(file.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("kind", ["features", "sketches", "maps"])
def test_damage_that_a_build_cures_costs_no_calibration(
    engines: Engines, calibrated: BuildOptions, kind: str
) -> None:
    harm(calibrated.store, kind)
    report = build(calibrated, texts(14))
    # Of the damaged map nothing was known before the texts were recorded.
    assert report["entries"] == (13 if kind == "maps" else 14)
    with LocalStore.open(calibrated.store) as store:
        assert (store.plan, store.artifact("templates")) == (CALIBRATED, b"maps")
        assert store.verify().ok
        assert nearest_of_all(store) == list(range(report["entries"]))


def test_a_damaged_projector_ends_a_calibration_with_a_warning(
    engines: Engines, calibrated: BuildOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(calibrated.store, "projector")
    report = build(calibrated, texts(14))
    assert "warning: the calibration is lost with the projector" in capsys.readouterr().err
    assert report["training"] is not None
    with LocalStore.open(calibrated.store) as store:
        assert Plan.from_dict(store.plan).sources.keys() == {"neighbour"}
        assert store.artifact("templates") is None
        assert store.verify().ok


def test_a_damaged_artifact_is_left_to_the_calibration(
    engines: Engines, calibrated: BuildOptions
) -> None:
    harm(calibrated.store, "artifact-templates")
    with pytest.raises(StoreDamaged, match="run 'attncache calibrate' again"):
        build(calibrated, texts(14))
    with LocalStore.open(calibrated.store, writable=True) as store:
        store.publish_plan(CALIBRATED, {"calibration": {}}, ARTIFACTS)
    assert build(calibrated, texts(14))["recorded"] == 0


def test_a_calibrated_store_with_too_few_sound_entries_stays_as_it_is(
    engines: Engines, calibrated: BuildOptions
) -> None:
    for segment in calibrated.store.glob("maps-*"):
        segment.write_bytes(b"")
    with pytest.raises(SettingsError, match="at least 8 entries"):
        build(calibrated, texts(10))
    with LocalStore.open(calibrated.store) as store:
        assert store.plan == CALIBRATED


# -- which texts -------------------------------------------------------------------------------


def test_texts_that_are_known_short_or_double_are_skipped(
    engines: Engines, options: BuildOptions
) -> None:
    some = texts(9)
    build(options, some)
    more = [*some, *texts(2, length=10), *texts(12, length=21), texts(12, length=21)[-1]]
    report = build(options, more)
    assert [len(ids) for ids in engines[1].prefilled] == [len(t.text.split()) for t in more[11:23]]
    assert (report["recorded"], report["skipped"], report["entries"]) == (12, 12, 21)


def test_texts_are_cut_at_the_tokens_asked_for_or_the_models(
    engines: Engines, options: BuildOptions
) -> None:
    build(replace(options, max_tokens=30), texts(8, length=50))
    assert set(lengths_in(options.store)) == {30}
    build(replace(options, max_tokens=1000), texts(8, length=90))
    assert set(lengths_in(options.store)[8:]) == {LONGEST}
    assert engines[1].options.max_tokens == LONGEST


def test_a_build_stops_at_its_bounds_and_goes_on_when_they_are_raised(
    engines: Engines, options: BuildOptions
) -> None:
    report = build(replace(options, max_entries=8), texts(20))
    assert report["entries"] == 8
    report = build(replace(options, max_entries=11), texts(20))
    assert (report["entries"], report["recorded"], report["skipped"]) == (11, 3, 8)
    some_bytes = report["bytes"] + 1
    report = build(replace(options, max_bytes=some_bytes), texts(20))
    # One more crosses the bound, which is looked at between texts.
    assert (report["entries"], report["recorded"]) == (12, 1)


def test_pairs_are_scored_as_the_model_joins_them(engines: Engines, options: BuildOptions) -> None:
    pairs = [Text(text.text, "a passage") for text in texts(8, length=30)]
    build(replace(options, max_tokens=31), pairs)
    assert [len(ids) for ids in engines[0].prefilled] == [31] * 8
    joined = tokenize(pairs[0].text, "a passage", True, 31).input_ids
    assert engines[0].prefilled[0] == joined


def test_pairs_for_a_model_that_scores_none_are_refused(
    engines: Engines, options: BuildOptions
) -> None:
    def refuse(llm: FakeLLM) -> None:
        def score(*args: Any, **kwargs: Any) -> None:
            raise ValueError("Score API is not supported")

        llm.score = score  # type: ignore[method-assign]

    engines.prepare = refuse
    with pytest.raises(SettingsError, match="needs a model that scores pairs, got SampleModel"):
        build(options, [Text("a query of two " * 5, "a passage")])
    assert engines[0].stopped


# -- interruptions and refusals ----------------------------------------------------------------


def test_what_was_recorded_before_an_interruption_is_kept_and_not_done_again(
    engines: Engines, options: BuildOptions
) -> None:
    def interrupt(llm: FakeLLM) -> None:
        prefill = llm.prefill

        def stop_after_five(token_ids: list[int]) -> None:
            if len(llm.prefilled) == 5:
                raise KeyboardInterrupt
            prefill(token_ids)

        llm.prefill = stop_after_five  # type: ignore[method-assign]

    engines.prepare = interrupt
    with pytest.raises(KeyboardInterrupt):
        build(options, texts(9))
    assert engines[0].stopped
    engines.prepare = lambda llm: None
    report = build(options, texts(9))
    assert (report["entries"], report["recorded"], report["skipped"]) == (9, 4, 5)


def test_an_engine_that_dies_leaves_what_was_committed(
    engines: Engines, options: BuildOptions
) -> None:
    engines.prepare = lambda llm: setattr(llm, "dies_at", 20)
    with pytest.raises(AttnCacheError, match=r"the engine stopped while recording; .* call again"):
        build(options, texts(30))
    assert engines[0].stopped
    engines.prepare = lambda llm: None
    report = build(options, texts(30))
    assert report["recorded"] == 30 - building.COMMIT_EVERY


def test_a_corpus_that_is_too_small_to_train_on_is_refused(
    engines: Engines, options: BuildOptions
) -> None:
    few = [*texts(MIN_ENTRIES - 1), *texts(5, length=3)]
    with pytest.raises(SettingsError, match=r"at least 8 entries .* got 7 of at least 16 tokens"):
        build(options, few)
    # Nothing is lost: with more texts the build goes on.
    assert build(options, texts(MIN_ENTRIES))["recorded"] == 1


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"layers": (6,)}, r"must be in 0\.\.5, got \[6\]"),
        ({"layers": (2,), "feature_layer": 3}, r"feature_layer must be in 0\.\.2"),
        ({"max_distance": float("nan")}, "a gate must be a finite number"),
    ],
)
def test_options_that_make_no_plan_are_refused_before_an_engine_starts(
    engines: Engines, options: BuildOptions, changes: dict[str, Any], rule: str
) -> None:
    with pytest.raises(SettingsError, match=rule):
        build(replace(options, **changes), texts(9))
    assert engines == []
