# SPDX-License-Identifier: Apache-2.0
"""Results of a calibration's trials, kept on disk so that one that was cut off goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attncache_vllm.calibrate.fidelity import Fidelity


class Trials:
    """Fidelity by the name of a trial.

    Every result is on disk before the next trial starts. A file of another calibration (other
    texts, options or model, told by ``fingerprint``) is begun anew.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._results = self._read()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, name: str, run: Callable[[], Fidelity]) -> Fidelity:
        """The result of trial ``name``, which ``run`` finds out if it is not known yet."""
        if name not in self._results:
            self._results[name] = run()
            self._write()
        return self._results[name]

    def discard(self) -> None:
        """Forget everything: the calibration is done."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Fidelity]:
        try:
            data: Any = json.loads(self._path.read_text(encoding="utf-8"))
            if data["fingerprint"] != self._fingerprint:
                return {}
            return {name: Fidelity(**result) for name, result in data["results"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        results = {name: asdict(result) for name, result in self._results.items()}
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(
            json.dumps({"fingerprint": self._fingerprint, "results": results}), encoding="utf-8"
        )
        os.replace(temporary, self._path)
