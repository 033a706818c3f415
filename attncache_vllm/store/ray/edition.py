# SPDX-License-Identifier: Apache-2.0
"""What was published for one model, and decides what its entries are comparable with."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack

from attncache_vllm.errors import StoreError
from attncache_vllm.store import checks
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.manifest import artifact_kind
from attncache_vllm.store.protocol import Namespace

MAX_BYTES = 1 << 30
MAX_DIM = 1 << 16

_VERSION = 1


@dataclass(frozen=True)
class Edition:
    """A model's namespace with what a build and a calibration published for it.

    Attributes:
        namespace: what must agree with a server's.
        build: the settings of the build; plain data.
        plan: which layers are reused and when; plain data, opaque to the store.
        report: how the calibration went; plain data, for people only.
        projector: the serialised projector that features are made with.
        dim: how many values a feature has.
        artifacts: further files by name, opaque to the store.
    """

    namespace: Namespace
    build: dict[str, Any]
    plan: dict[str, Any]
    report: dict[str, Any]
    projector: bytes
    dim: int
    artifacts: dict[str, bytes]

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of everything that makes maps and features comparable: all but the report and
        the model's name. Entries are kept below it, so that those of another never match."""
        compared = self._fields()
        del compared["report"]
        compared["namespace"] = self.namespace.digest()
        return hashlib.sha256(msgpack.packb(compared)).hexdigest()

    @classmethod
    def of(cls, store: LocalStore) -> "Edition":
        """What is published in an embedded store; ``StoreError`` if nothing is or it is damaged."""
        plan, manifest = store.plan, store.manifest
        published = manifest.published
        assert published is not None, "a store without publication has no plan"
        artifacts = {name: store.artifact(name) for name in published.artifacts}
        return cls(
            namespace=manifest.namespace,
            build=manifest.build,
            plan=plan,
            report=published.report,
            projector=store.projector_bytes,
            dim=published.dim,
            artifacts={name: data for name, data in artifacts.items() if data is not None},
        )

    def to_bytes(self) -> bytes:
        """What ``from_bytes`` reads; ``StoreError`` if it would not."""
        data: bytes = msgpack.packb({"version": _VERSION, **self._fields()})
        try:
            Edition.from_bytes(data)
        except ValueError as error:
            raise StoreError(f"the edition cannot be stored: {error}") from error
        return data

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> "Edition":
        """The inverse of ``to_bytes``.

        Raises:
            ValueError: it is too big, a field is missing, unknown, ill-typed or out of range, or
                another release wrote it.
        """
        if len(data) > MAX_BYTES:
            raise ValueError(f"an edition must have at most {MAX_BYTES} bytes, got {len(data)!r}")
        names = ["version", "namespace", "build", "plan", "report", "projector", "dim", "artifacts"]
        given = checks.fields(checks.unpack(data), names, "an edition")
        if given["version"] != _VERSION:
            raise ValueError(
                f"an edition's version must be {_VERSION}, got {given['version']!r}; "
                "run servers and shards of one release"
            )
        artifacts = _mapping(given["artifacts"], "artifacts")
        for name, content in artifacts.items():
            artifact_kind(name)
            _bytes(content, f"the artifact {name}")
        return cls(
            namespace=Namespace.from_dict(given["namespace"]),
            build=_mapping(given["build"], "build"),
            plan=_mapping(given["plan"], "plan"),
            report=_mapping(given["report"], "report"),
            projector=_bytes(given["projector"], "projector"),
            dim=checks.integer(given["dim"], 1, MAX_DIM, "dim"),
            artifacts=artifacts,
        )

    def _fields(self) -> dict[str, Any]:
        return {
            "namespace": self.namespace.to_dict(),
            "build": self.build,
            "plan": self.plan,
            "report": self.report,
            "projector": self.projector,
            "dim": self.dim,
            "artifacts": dict(sorted(self.artifacts.items())),
        }


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} must be a mapping with string keys, got {checks.shown(value)}")
    return value


def _bytes(value: object, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"{what} must be bytes, got {checks.shown(value)}")
    return value
