# SPDX-License-Identifier: Apache-2.0
"""What is published for a model: what makes it another edition, and what is refused as none."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from entry_samples import EDITION
from hypothesis import given
from hypothesis import strategies as st
from store_samples import ARTIFACTS, NAMESPACE, build_store

from attncache_vllm.errors import StoreError
from attncache_vllm.store import LocalStore
from attncache_vllm.store.ray.edition import Edition


def test_the_edition_of_an_embedded_store_is_what_was_published(tmp_path: Path) -> None:
    build_store(tmp_path / "store", 3)
    with LocalStore.open(tmp_path / "store") as store:
        assert Edition.of(store) == EDITION


def test_a_store_that_was_not_published_has_no_edition(tmp_path: Path) -> None:
    with (
        LocalStore.create(tmp_path / "store", NAMESPACE, {}) as store,
        pytest.raises(StoreError, match="built to its end"),
    ):
        Edition.of(store)


def test_an_edition_survives_the_round_trip() -> None:
    again = Edition.from_bytes(EDITION.to_bytes())
    assert (again, again.digest) == (EDITION, EDITION.digest)


CHANGES: dict[str, Any] = {
    "namespace": replace(NAMESPACE, dtype="float16"),
    "build": {"texts": "others"},
    "plan": {"layers": [3]},
    "projector": b"another",
    "dim": 9,
    "artifacts": {**ARTIFACTS, "templates": b"other"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_makes_maps_and_features_comparable_makes_the_digest(name: str) -> None:
    assert replace(EDITION, **{name: CHANGES[name]}).digest != EDITION.digest


@pytest.mark.parametrize(
    "change",
    [
        {"report": {"loss": 0.1}},
        {"namespace": replace(NAMESPACE, model="the same/elsewhere")},
        {"artifacts": dict(reversed(ARTIFACTS.items()))},
    ],
)
def test_what_is_for_people_does_not(change: dict[str, Any]) -> None:
    assert replace(EDITION, **change).digest == EDITION.digest


def test_every_field_is_in_the_digest_or_known_to_be_left_out() -> None:
    assert {field.name for field in fields(Edition)} == {*CHANGES, "report"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("namespace", {}),
        ("namespace", {**NAMESPACE.to_dict(), "num_layers": 0}),
        ("build", []),
        ("plan", None),
        ("report", {1: 2}),
        ("projector", "text"),
        ("dim", 0),
        ("dim", 1 << 17),
        ("dim", 8.0),
        ("artifacts", {"../templates": b""}),
        ("artifacts", {"templates": "text"}),
        ("extra", 1),
    ],
)
def test_what_is_not_an_edition_is_refused(name: str, value: object) -> None:
    given_fields = msgpack.unpackb(EDITION.to_bytes())
    with pytest.raises(ValueError):
        Edition.from_bytes(msgpack.packb({**given_fields, name: value}))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_edition(data: bytes) -> None:
    with pytest.raises(ValueError):
        Edition.from_bytes(data)


def test_what_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(StoreError, match="dim must be an integer"):
        replace(EDITION, dim=0).to_bytes()
