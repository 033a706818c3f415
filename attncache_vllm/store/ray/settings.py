# SPDX-License-Identifier: Apache-2.0
"""The settings of a cluster of shards; see ``configs/ray-local.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from attncache_vllm.errors import SettingsError
from attncache_vllm.store.ray.placement import MAX_SHARDS
from attncache_vllm.store.ray.shard import Limits
from attncache_vllm.validation import FrozenSettings, explain, read_yaml

MIB = 1024 * 1024


class ClusterSettings(FrozenSettings):
    """What ``attncache store up`` brings up."""

    address: str = Field(
        "local",
        min_length=1,
        description="`local`: start a head on this machine. `auto` or `HOST:PORT`: "
        "join the cluster this machine is a node of. `ray://HOST:PORT`: come in from outside.",
    )
    port: int = Field(6379, ge=1, le=65535, description="Port of a head that is started here.")
    authentication: Literal["token", "disabled"] = Field(
        "token",
        description="Whether a head that is started here asks for Ray's token, which every process "
        "of this user then finds in its home folder.",
    )
    shards: int = Field(ge=1, le=MAX_SHARDS, description="Actors the entries are spread over.")
    replicas: int = Field(
        1, ge=1, description="Shards that hold an entry; with two, any one may be lost."
    )
    folder: Path = Field(
        strict=False,
        description="Where a node keeps the entries of its shards. An absolute path, the same on "
        "every node.",
    )
    placement: Literal["pinned", "spread"] = Field(
        "pinned",
        description="`pinned`: a shard lives on the machine that has its folder, and waits for it "
        "if it is away. `spread`: Ray chooses a machine whenever it starts a shard, which finds "
        "its entries if the machines share `folder`.",
    )
    shard_mib: int = Field(ge=1, description="Bound of the entries of one shard, in MiB.")
    tenant_mib: int | None = Field(
        None, ge=1, description="Bound of the entries of one tenant in one shard, in MiB."
    )
    ttl_s: float | None = Field(
        None, gt=0.0, description="Seconds after which an entry is forgotten (null: never)."
    )
    key_file: Path | None = Field(
        None,
        strict=False,
        description="File on every node with the key by which entries are authenticated "
        "(HMAC-SHA256) when they are read back. It never leaves the node.",
    )
    num_cpus: float = Field(
        1.0, ge=0.0, description="Cores that Ray reserves for one shard on its node."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.replicas > self.shards:
            raise ValueError(f"replicas must be at most the {self.shards} shards")
        if not self.folder.is_absolute():
            raise ValueError("folder must be absolute: an actor has a working directory of its own")
        if self.key_file is not None and not self.key_file.is_absolute():
            raise ValueError("key_file must be absolute: an actor has its own working directory")
        return self

    @property
    def cluster(self) -> str:
        """What Ray calls the cluster."""
        return f"127.0.0.1:{self.port}" if self.address == "local" else self.address

    @property
    def limits(self) -> Limits:
        tenant = None if self.tenant_mib is None else self.tenant_mib * MIB
        return Limits(self.shard_mib * MIB, tenant, self.ttl_s)


def load_cluster_settings(path: Path) -> ClusterSettings:
    """Read the settings of a cluster; relative paths are taken from the present folder.

    Raises:
        SettingsError: the file cannot be read, or a setting is unknown, missing or out of range.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise SettingsError(
            "settings must be an object of keys and values or the path of a YAML file, "
            f"got {raw!r} from {path}."
        )
    for name in ("folder", "key_file"):
        if isinstance(raw.get(name), str):
            raw[name] = str(Path(raw[name]).expanduser().absolute())
    try:
        return ClusterSettings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(explain(error, str(path), ClusterSettings, [])) from None
