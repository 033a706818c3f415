# SPDX-License-Identifier: Apache-2.0
"""What an engine refuses to start with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_samples import (
    make_config,
    make_model,
    run_model,
    whole,
)
from recorded_stores import (
    RECORD,
    TEXTS,
    publish,
    recorded,
    settings,
)
from startup_samples import (
    refusal,
)

from attncache_vllm.engine.startup import attach, check_before_start
from attncache_vllm.errors import (
    AttnCacheError,
    NamespaceMismatch,
    SettingsError,
    StoreError,
)
from attncache_vllm.reuse.plan import Plan

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.usefixtures("clean_slate"),
]


def test_a_plan_of_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    plan = Plan.reusing(4, 2, (1, 2), max_distance=1.0)
    path = publish(recorded(tmp_path / "store"), plan)
    config = make_config(settings(path))
    for refuse in (check_before_start, lambda config: attach(make_model(), config)):
        message = refusal(StoreError, lambda refuse=refuse: refuse(config))
        assert "must be for the model's 3 layers, got 4; build the store again" in message


def test_a_projector_of_another_width_is_refused(tmp_path: Path) -> None:
    path = publish(recorded(tmp_path / "store"), hidden_size=40)
    message = refusal(StoreError, lambda: attach(make_model(), make_config(settings(path))))
    assert "inputs of width 40, the model has 48" in message


def test_a_store_of_other_weights_is_refused_by_the_worker(published_store: Path) -> None:
    model = make_model()
    model.model.layers[2].mlp.weight.data += 1
    message = refusal(
        NamespaceMismatch, lambda: attach(model, make_config(settings(published_store)))
    )
    assert "weights: store has" in message


def test_a_store_of_another_model_is_refused_before_start(published_store: Path) -> None:
    check_before_start(make_config(settings(published_store)))
    config = make_config(settings(published_store), model_config__dtype=torch.bfloat16)
    message = refusal(NamespaceMismatch, lambda: check_before_start(config))
    assert "dtype: store has 'float32', server has 'bfloat16'" in message


def test_a_store_that_was_not_published_is_refused_before_start(tmp_path: Path) -> None:
    config = make_config(settings(recorded(tmp_path / "store")))
    assert refusal(StoreError, lambda: check_before_start(config))


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        ([1, 7], r"must be attention layers of the model, got [7]; it has [0, 1, 2]"),
        ([0, 2], "layer 2 cannot be recorded: attention sinks; leave it out with --layers"),
    ],
)
def test_layers_that_cannot_be_recorded_are_refused(
    tmp_path: Path, layers: list[int], rule: str
) -> None:
    model = make_model()
    model.model.layers[2].self_attn.attn.has_sink = True
    config = make_config(settings(tmp_path / "store", record={"layers": layers}))
    assert rule in refusal(SettingsError, lambda: attach(model, config))
    assert not (tmp_path / "store").exists()


def test_a_module_that_does_more_than_its_children_show_ends_the_recording(tmp_path: Path) -> None:
    model = make_model()
    module = model.model.layers[2].self_attn
    attend = module.attend
    module.attend = lambda states, positions: 1.1 * attend(states, positions)
    attach(model, make_config(settings(tmp_path / "store", record=RECORD)))
    message = refusal(AttnCacheError, lambda: run_model(model, [whole(TEXTS[0])]))
    assert message.startswith("layer 2 does not give its own answer from its own map")


def test_a_feature_layer_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    asked = {"layers": [1], "feature_layer": 5}
    config = make_config(settings(tmp_path / "store", record=asked))
    message = refusal(SettingsError, lambda: attach(make_model(), config))
    assert "must be an attention layer of the model, got 5; it has [0, 1, 2]" in message
    assert not (tmp_path / "store").exists()


def test_an_engine_that_parts_its_prompts_cannot_record(tmp_path: Path) -> None:
    config = make_config(
        settings(tmp_path / "store", record=RECORD), cache_config__enable_prefix_caching=True
    )
    message = refusal(SettingsError, lambda: check_before_start(config))
    assert message.startswith("maps cannot be recorded by this engine: prefix caching")


def test_a_store_is_extended_with_the_settings_it_was_begun_with(published_store: Path) -> None:
    check_before_start(make_config(settings(published_store, record=RECORD)))
    other = make_config(settings(published_store, record={**RECORD, "layers": [2]}))
    for refuse in (check_before_start, lambda config: attach(make_model(), config)):
        message = refusal(SettingsError, lambda refuse=refuse: refuse(other))
        assert "a store is extended with the settings it was begun with" in message
