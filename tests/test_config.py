# SPDX-License-Identifier: Apache-2.0
"""Settings: what is accepted is kept as given, and every refusal says rule, value and remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from attncache_vllm.config import RecordSettings, Settings, load_settings
from attncache_vllm.errors import SettingsError

STORE = {"store": "maps"}
RECORD = {"layers": [4, 5], "feature_layer": 1, "slots": 4}

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
complete = st.fixed_dictionaries(
    {"store": st.text("abc/.", min_size=1)},
    optional={
        "max_distance": st.none() | positive | st.just(0),
        "plan": st.none() | st.text("abc/.", min_size=1),
        "canary_share": st.floats(0, 1),
        "min_tokens": st.integers(1, 10**6),
        "lookup_deadline_ms": positive,
        "resident_mib": st.integers(1, 10**6),
        "unsalted": st.sampled_from(["shared", "off"]),
        "reuse_with_prefix_caching": st.booleans(),
        "log_interval_s": positive,
        "record": st.none() | st.just(RECORD),
    },
)


def load(value: object) -> Settings:
    return load_settings({"attncache": value})


def refusal(value: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load(value)
    return str(caught.value)


@given(complete)
def test_given_settings_are_kept_and_the_others_have_their_defaults(given: dict[str, Any]) -> None:
    settings = load(given)
    for name, value in given.items():
        if name == "record" and value is not None:
            value = RecordSettings(**{**value, "layers": tuple(value["layers"])})
        if name in ("store", "plan") and value is not None:
            value = Path(value)
        assert getattr(settings, name) == value
    for name, field in Settings.model_fields.items():
        if name not in given:
            assert getattr(settings, name) == field.default


@given(complete)
def test_a_yaml_file_means_what_the_same_inline_object_means(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    path.write_text(yaml.safe_dump(given))
    assert load(str(path)) == load(given)


def test_a_bare_off_in_yaml_is_the_word(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("store: maps\nunsalted: off\n")
    assert load(str(path)).unsalted == "off"


@pytest.mark.parametrize(
    "address",
    [
        *("ray:auto", "ray:head:6379", "ray:10.0.0.7:6379", "ray:[fd00::7]:6379"),
        *("ray://head.example:10001", "ray://[::1]:10001"),
    ],
)
def test_an_address_of_a_store_is_kept_as_given(address: str) -> None:
    settings = load({"store": address})
    assert settings.store == address and isinstance(settings.store, str)
    with pytest.raises(SettingsError, match="built and calibrated in a folder") as caught:
        _ = settings.folder
    assert f"got {address!r}" in str(caught.value)


@pytest.mark.parametrize("folder", ["maps", "./ray:auto", "/ray:auto", "rays", "ray"])
def test_what_does_not_begin_like_an_address_is_a_folder(folder: str) -> None:
    settings = load({"store": folder})
    assert settings.store == settings.folder == Path(folder)


@pytest.mark.parametrize(
    "address",
    [
        *("ray:", "ray:local", "ray:head", "ray:head:", "ray:head:port", "ray:head:123456"),
        *("ray://auto", "ray://head", "ray:/head:6379", "ray:a b:1", "ray:auto ", "ray:::1:6379"),
    ],
)
def test_a_malformed_address_is_refused_with_the_forms_that_there_are(address: str) -> None:
    message = refusal({"store": address})
    assert "setting 'store': input is not a valid address" in message
    assert "ray:auto, ray:HOST:PORT or ray://HOST:PORT" in message
    assert f"got {address!r}" in message


def test_texts_are_admitted_to_a_store_on_a_cluster_that_is_served_by_its_own_plan() -> None:
    assert load({"store": "ray:auto", "admit_per_minute": 3}).admit_per_minute == 3
    assert load({**STORE, "admit_per_minute": 0}).admit_per_minute == 0
    message = refusal({"store": "ray:auto", "plan": "plan.json", "admit_per_minute": 2.5})
    assert "setting 'admit_per_minute': input must be 0 beside another plan than the" in message
    assert "leave out one of the two, got 2.5" in message


def test_settings_cannot_be_changed_and_can_be_keys() -> None:
    settings = load({**STORE, "record": RECORD})
    with pytest.raises(ValidationError, match="frozen"):
        settings.min_tokens = 3
    assert settings.record is not None
    with pytest.raises(ValidationError, match="frozen"):
        settings.record.slots = 3
    assert {settings: 1}[load({**STORE, "record": RECORD})] == 1


def test_resident_bytes_are_mebibytes() -> None:
    assert load({**STORE, "resident_mib": 3}).resident_bytes == 3 * 1024 * 1024


@pytest.mark.parametrize("absent", [None, {}, {"other_plugin": {}}, {"attncache": None}])
def test_a_selected_backend_without_settings_is_refused_with_an_example(absent: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(absent)
    message = str(caught.value)
    assert "needs its settings" in message
    assert f"got {absent!r}" in message
    assert '--additional-config \'{"attncache": {"store": "DIR"}}\'' in message


def test_an_unknown_setting_is_named_with_the_known_ones() -> None:
    message = refusal({**STORE, "max_distanse": 0.1})
    assert "unknown setting 'max_distanse', got 0.1" in message
    assert all(name in message for name in Settings.model_fields)


def test_an_unknown_setting_of_recording_is_named_with_those_of_recording() -> None:
    known = refusal({**STORE, "record": {**RECORD, "slot": 1}}).split("known: ")[1]
    assert known == ", ".join(RecordSettings.model_fields)


def test_a_missing_store_is_named_with_what_was_given() -> None:
    message = refusal({"min_tokens": 4})
    assert "setting 'store' is required, got {'min_tokens': 4}; add it" in message


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("store", 3, "valid path"),
        ("store", None, "valid path"),
        ("plan", 3, "valid path"),
        ("canary_share", -0.01, "greater than or equal to 0"),
        ("canary_share", 1.01, "less than or equal to 1"),
        ("canary_share", "1%", "valid number"),
        ("canary_share", math.nan, "finite number"),
        ("max_distance", "0.1", "valid number"),
        ("max_distance", -0.1, "greater than or equal to 0"),
        ("max_distance", math.inf, "finite number"),
        ("max_distance", math.nan, "finite number"),
        ("min_tokens", True, "valid integer"),
        ("min_tokens", 16.0, "valid integer"),
        ("min_tokens", 0, "greater than or equal to 1"),
        ("lookup_deadline_ms", 0, "greater than 0"),
        ("lookup_deadline_ms", math.inf, "finite number"),
        ("resident_mib", 0, "greater than or equal to 1"),
        ("unsalted", "on", "'shared' or 'off'"),
        ("unsalted", True, "'shared' or 'off'"),
        ("unsalted", None, "'shared' or 'off'"),
        ("reuse_with_prefix_caching", 1, "valid boolean"),
        ("reuse_with_prefix_caching", "yes", "valid boolean"),
        ("admit_per_minute", -1, "greater than or equal to 0"),
        ("admit_per_minute", 0.5, "0 for a store in a folder, which servers only read; give 0, or"),
        ("log_interval_s", 0.0, "greater than 0"),
        ("log_interval_s", "often", "valid number"),
        ("record", [4, 5], "valid dictionary"),
    ],
)
def test_a_wrong_type_or_range_is_refused_with_rule_and_value(
    name: str, value: object, rule: str
) -> None:
    message = refusal({**STORE, name: value})
    assert f"setting {name!r}: input " in message
    assert rule in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layers": [4, -1]}, "record.layers.1"),
        ({"layers": [4, True]}, "record.layers.1"),
        ({"layers": 4}, "record.layers"),
        ({"feature_layer": -1}, "record.feature_layer"),
        ({"slots": 0}, "record.slots"),
        ({"slots": 257}, "record.slots"),
    ],
)
def test_wrong_settings_of_recording_are_refused_by_their_place(
    change: dict[str, object], key: str
) -> None:
    assert f"setting {key!r}: input " in refusal({**STORE, "record": {**RECORD, **change}})


def test_all_mistakes_are_reported_at_once() -> None:
    message = refusal({"stroe": "maps", "min_tokens": 0})
    for part in ("'stroe'", "'store' is required", "'min_tokens'"):
        assert part in message


@pytest.mark.parametrize("value", [[], ["maps"], 3, True])
def test_settings_that_are_no_object_are_refused(value: object) -> None:
    message = refusal(value)
    assert "must be an object of keys and values or the path of a YAML file" in message
    assert f"got {value!r} from --additional-config" in message


@pytest.mark.parametrize("text", ["", "- store\n", "maps\n"])
def test_a_yaml_file_that_holds_no_object_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    message = refusal(str(path))
    assert "must be an object" in message
    assert message.endswith(f"from {path}.")


def test_a_mistake_in_a_yaml_file_is_reported_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("store: maps\nmin_tokens: 0\n")
    message = refusal(str(path))
    assert f"in {path}: setting 'min_tokens'" in message


def test_a_missing_yaml_file_is_refused_with_the_folder_it_is_looked_for_in(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    message = refusal(str(path))
    assert "must be readable: No such file" in message
    assert repr(str(path)) in message
    assert "folder that the command was started in" in message


@pytest.mark.parametrize(
    ("content", "rule"),
    [(b"store: [maps", "is not valid YAML"), (b"store: \xff\xfe", "must be UTF-8")],
)
def test_a_malformed_yaml_file_is_refused_by_name(
    tmp_path: Path, content: bytes, rule: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    message = refusal(str(path))
    assert f"the settings file {str(path)!r} {rule}: " in message


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("!!python/object/apply:os.getcwd []\n")
    assert "is not valid YAML" in refusal(str(path))
