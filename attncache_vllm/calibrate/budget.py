# SPDX-License-Identifier: Apache-2.0
"""What may be lost, in terms of the answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncache_vllm.calibrate.fidelity import Fidelity
from attncache_vllm.errors import SettingsError


@dataclass(frozen=True)
class Budget:
    """The least that a plan must keep.

    Attributes:
        rank: Spearman's correlation of the similarities of all pairs of texts.
        self_retrieval: share of texts that still find themselves among the exact ones.
        task: how much of a task's own metric may be lost.

    What is None is not asked.
    """

    rank: float | None = 0.99
    self_retrieval: float | None = 0.99
    task: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``rank=0.99,self-retrieval=0.98`` or ``task=0.003``; what is left out is not asked.

        Raises:
            SettingsError: an unknown name, or a value that is not a number from 0 to 1.
        """
        given: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            key = name.replace("-", "_")
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if key not in cls.__dataclass_fields__ or not 0 <= number <= 1:
                known = ", ".join(field.replace("_", "-") for field in cls.__dataclass_fields__)
                raise SettingsError(
                    f"a budget must be like rank=0.99,self-retrieval=0.99 with names among {known} "
                    f"and numbers from 0 to 1, got {part.strip()!r}"
                )
            given[key] = number
        return cls(given.get("rank"), given.get("self_retrieval"), given.get("task"))

    def slack(self, fidelity: Fidelity) -> float:
        """How far the worst of the figures is inside the budget; below 0 it is outside.

        Raises:
            ValueError: the budget is of a task and the fidelity is not.
        """
        slacks = [math.inf]
        if self.rank is not None:
            slacks.append(fidelity.pairwise_spearman - self.rank)
        if self.self_retrieval is not None:
            slacks.append(fidelity.self_retrieval - self.self_retrieval)
        if self.task is not None:
            if fidelity.task_change is None:
                raise ValueError("a budget of a task needs the task's metric, got None")
            slacks.append(fidelity.task_change + self.task)
        return min(slacks)

    def holds(self, fidelity: Fidelity) -> bool:
        """Whether a plan of this fidelity is inside the budget."""
        return self.slack(fidelity) >= 0

    def without_task(self) -> Budget:
        """For texts that belong to no task: if nothing else was asked, the defaults are."""
        if self.rank is None and self.self_retrieval is None:
            return Budget()
        return Budget(self.rank, self.self_retrieval)
