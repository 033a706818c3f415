# SPDX-License-Identifier: Apache-2.0
"""The one settings object of the plugin.

It travels inside vLLM's own configuration, ``--additional-config '{"attncache": {...}}'``, and so
reaches every spawned process without a channel of our own. In place of the inline object a path to
a YAML file with the same keys may be given: ``--additional-config '{"attncache": "file.yaml"}'``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from attncache_vllm.errors import SettingsError
from attncache_vllm.names import CodecName
from attncache_vllm.validation import FrozenSettings, explain, read_yaml

SETTINGS_KEY = "attncache"
MIB = 1024 * 1024

# A head or raylet to join, or the server of a Ray Client; an IPv6 host stands in brackets.
_ON_RAY = re.compile(r"ray:(auto|(//)?([^\s/:\[\]]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})")


def _folder_or_address(value: object) -> Path | str:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("store", "Input is not a valid path or address of a store")
    if not value.startswith("ray:"):
        return Path(value)
    if not _ON_RAY.fullmatch(value):
        raise PydanticCustomError(
            "store",
            "Input is not a valid address of a store on Ray, which is ray:auto, ray:HOST:PORT or "
            "ray://HOST:PORT",
        )
    return value


def _word_of_switch(value: object) -> object:
    # To YAML a bare `off` is a switch.
    return "off" if value is False else value


class RecordSettings(FrozenSettings):
    """Recording of maps instead of serving; set by ``attncache build``, never by hand."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        description="Layers whose maps are recorded."
    )
    feature_layer: int = Field(0, ge=0, description="Layer whose input becomes the feature.")
    slots: int = Field(8, ge=1, le=256, description="Positions the feature input is pooled to.")
    codec: CodecName = Field("tiles-u8-lse", description="How maps are stored.")


class Settings(FrozenSettings):
    """Settings of one engine.

    Every field has a reader; the table in ``docs/settings.md`` is generated from this class.
    """

    store: Annotated[
        Path | str, PlainValidator(_folder_or_address, json_schema_input_type=Path | str)
    ] = Field(
        description="Folder of the map store, or the address of one on a Ray cluster: `ray:auto` "
        "or `ray:HOST:PORT` to join it, `ray://HOST:PORT` as a Ray Client."
    )
    plan: Path | None = Field(
        None,
        strict=False,
        description="JSON file of a plan to use in place of the one stored with the maps, as "
        "`attncache inspect --plan` prints it.",
    )
    max_distance: float | None = Field(
        None,
        ge=0.0,
        description="Largest feature distance that still counts as a hit, in place of the gate "
        "that was stored with the maps. Features of one text computed in different batches differ "
        "by rounding, so 0 may refuse even the text itself.",
    )
    min_tokens: int = Field(
        16, ge=1, description="Shorter sequences are computed exactly (counted as a bypass)."
    )
    lookup_deadline_ms: float = Field(
        200.0,
        gt=0.0,
        description="Longest time between the start of a lookup and the first reused layer; "
        "whatever has not arrived by then is a miss.",
    )
    resident_mib: int = Field(
        1024, ge=1, description="Bound of the decoded maps kept in memory, in MiB."
    )
    unsalted: Annotated[Literal["shared", "off"], BeforeValidator(_word_of_switch)] = Field(
        "shared",
        description="What becomes of requests without a `cache_salt`: they are looked up among the "
        "entries of the shared tenant, as all in a folder are, or bypassed. A request with one is "
        "looked up among the entries of its own tenant only.",
    )
    reuse_with_prefix_caching: bool = Field(
        False,
        description="Reuse maps in an engine that caches prefixes. A hit then computes and writes "
        "its keys and values as ever and saves less, and a later request with the same prefix "
        "reads them: it inherits the hit's approximation without being a hit itself.",
    )
    canary_share: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="Share of the hits that are computed exactly, answered exactly, and compared "
        "layer by layer with what would have served them. A layer whose error has left its "
        "calibrated band is computed exactly from then on.",
    )
    only_where_it_pays: bool = Field(
        True,
        description="Measure at start, in a few seconds, what each layer costs with and without "
        "maps at several lengths, and reuse only where that is faster on this machine. Without it "
        "every hit is taken: to see what reuse keeps, not what it saves.",
    )
    admit_per_minute: float = Field(
        0.0,
        ge=0.0,
        description="How many texts that no entry serves are at most recorded a minute, to be "
        "admitted to the store: the server learns from what it is asked. Such a text is computed "
        "exactly, even where templates would serve it. 0 records nothing. For a store on a Ray "
        "cluster that is served by its own plan.",
    )
    log_interval_s: float = Field(
        30.0, gt=0.0, description="Seconds between two log lines with the counters."
    )
    record: RecordSettings | None = Field(
        None, description="Set by `attncache build`: record maps instead of reusing them."
    )

    calibrate: bool = Field(
        False, description="Set by `attncache calibrate`: reuse only what it asks for."
    )

    @field_validator("admit_per_minute")
    @classmethod
    def _admits(cls, value: float, given: ValidationInfo) -> float:
        if value and isinstance(given.data.get("store"), Path):
            raise PydanticCustomError(
                "admission",
                "Input must be 0 for a store in a folder, which servers only read; give 0, or the "
                "address of a store on a Ray cluster",
            )
        if value and given.data.get("plan") is not None:
            raise PydanticCustomError(
                "admission",
                "Input must be 0 beside another plan than the store's, whose layers the entries "
                "must hold; leave out one of the two",
            )
        return value

    @property
    def folder(self) -> Path:
        """The store, where only a folder will do.

        Raises:
            SettingsError: it is on a Ray cluster.
        """
        if isinstance(self.store, Path):
            return self.store
        raise SettingsError(
            f"a store is built and calibrated in a folder, got {self.store!r}; give a folder, and "
            "load it into the cluster afterwards"
        )

    @property
    def resident_bytes(self) -> int:
        return self.resident_mib * MIB


def load_settings(additional_config: Mapping[str, Any] | None) -> Settings:
    """Read the settings from vLLM's ``additional_config``.

    Raises:
        SettingsError: no ``attncache`` key, an unknown key, a value out of range, or a YAML file
            that cannot be read. The message gives the rule, the value and the remedy.
    """
    raw = (additional_config or {}).get(SETTINGS_KEY)
    if raw is None:
        raise SettingsError(
            "the attncache backend needs its settings: pass "
            '--additional-config \'{"attncache": {"store": "DIR"}}\' (or '
            '\'{"attncache": "settings.yaml"}\'), '
            f"got {additional_config!r}. Make a store with `attncache build`."
        )
    origin = "--additional-config"
    if isinstance(raw, str):
        origin, raw = raw, read_yaml(Path(raw))
    if not isinstance(raw, Mapping):
        raise SettingsError(
            "settings must be an object of keys and values or the path of a YAML file, "
            f"got {raw!r} from {origin}."
        )
    try:
        # JSON and YAML know lists only; tuples keep the frozen object hashable.
        record = raw.get("record")
        if isinstance(record, Mapping) and isinstance(record.get("layers"), list):
            raw = {**raw, "record": {**record, "layers": tuple(record["layers"])}}
        return Settings.model_validate(dict(raw))
    except ValidationError as error:
        raise SettingsError(explain(error, origin, Settings, [RecordSettings])) from None
