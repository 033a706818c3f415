# SPDX-License-Identifier: Apache-2.0
"""From damages to a plan: nested sets of what to serve, and the largest inside the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any, TypeVar

from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.fidelity import Fidelity
from attncache_vllm.calibrate.saving import SavingModel
from attncache_vllm.reuse.plan import SourcePlan

Damages = Mapping[tuple[int, int], float]
Groups = dict[int, tuple[int, ...]]
T = TypeVar("T")

# Shares of the KV groups at which a curve is measured; below the first it is halved if that is too
# much.
SHARES = (1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
# So far below the budget a curve does not come back.
HOPELESS = 0.006
# So often the gap between what is inside the budget and what is not is halved.
HALVINGS = 2


@dataclass(frozen=True)
class Chosen:
    """What was chosen of one source.

    Attributes:
        plan: to be published.
        sensitivity: per layer and KV group the damage when it alone is served, 1 less the centred
            cosine to the exact answers.
        curve: fidelity and saving of each candidate on the texts that chose.
        predicted: the plan's fidelity on texts that chose nothing, with 95 % intervals.
    """

    plan: SourcePlan
    sensitivity: list[list[float]]
    curve: list[dict[str, Any]]
    predicted: dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A set of KV groups by layer that could be served."""

    name: str
    groups: Groups
    groups_share: float
    saving: float

    @property
    def shares(self) -> dict[str, float]:
        """For reports."""
        return {"groups_share": round(self.groups_share, 4), "saving": round(self.saving, 4)}


def candidates(
    parcels: Sequence[tuple[tuple[int, int], ...]],
    saving: SavingModel,
    shares: Sequence[float] = SHARES,
) -> list[Candidate]:
    """Nested sets of the first parcels of (layer, KV group), at about ``shares`` of all groups."""
    total = saving.num_layers * next(iter(saving.layouts.values())).num_kv_heads
    found: dict[int, Candidate] = {}
    for share in shares:
        taken: list[tuple[int, int]] = []
        for parcel in parcels:
            if taken and len(taken) + len(parcel) > round(share * total):
                break
            taken += parcel
        if taken and len(taken) not in found:
            groups = by_layer(taken)
            whole = sum(len(g) == saving.layouts[i].num_kv_heads for i, g in groups.items())
            found[len(taken)] = Candidate(
                f"{whole} whole layers, {len(taken)} KV groups",
                groups,
                len(taken) / total,
                saving.share(groups),
            )
    return list(found.values())


def by_layer(items: Sequence[tuple[int, int]]) -> Groups:
    """``[(layer, group), ...]`` as groups by layer, all ascending."""
    groups: dict[int, list[int]] = {}
    for layer, group in sorted(items):
        groups.setdefault(layer, []).append(group)
    return {layer: tuple(of_layer) for layer, of_layer in groups.items()}


def measure_curve(
    sets_of: Callable[[Sequence[float]], list[Candidate]],
    budget: Budget,
    measure: Callable[[Candidate], Fidelity],
) -> list[tuple[Candidate, Fidelity]]:
    """Fidelity of nested candidates, smallest first, until they are hopeless, and of some between
    the last that is inside the budget and the next, which is not.

    ``sets_of`` gives the candidates at some shares of the KV groups.
    """
    curve = []
    for candidate in sets_of(SHARES):
        fidelity = measure(candidate)
        curve.append((candidate, fidelity))
        if budget.slack(fidelity) < -HOPELESS:
            break
    for _ in range(HALVINGS):
        holds = [budget.holds(fidelity) for _, fidelity in curve]
        if all(holds):
            break
        last = max((number for number, inside in enumerate(holds) if inside), default=-1)
        if last == len(curve) - 1:
            break
        low = curve[last][0].groups_share if last >= 0 else 0.0
        known = [candidate.groups for candidate, _ in curve]
        between = sets_of([(low + curve[last + 1][0].groups_share) / 2])
        if not between or between[0].groups in known:
            break
        curve.insert(last + 1, (between[0], measure(between[0])))
    return curve


def best_first(curve: Sequence[tuple[Candidate, Fidelity]], budget: Budget) -> list[Candidate]:
    """The candidates inside the budget, largest saving first."""
    inside = [candidate for candidate, fidelity in curve if budget.holds(fidelity)]
    return sorted(inside, key=lambda candidate: -candidate.saving)


def first_that_passes(
    ordered: Sequence[Candidate],
    sets_of: Callable[[Sequence[float]], list[Candidate]],
    check: Callable[[Candidate], T | None],
) -> tuple[Candidate, T] | None:
    """The first candidate that passes, with what its check returned.

    ``ordered`` is coarse: below a candidate that has failed, further ones are tried halfway to the
    next that passes, or to nothing.
    """
    failed: Candidate | None = None
    best: tuple[Candidate, T] | None = None
    for candidate in ordered:
        if (found := check(candidate)) is not None:
            best = candidate, found
            break
        failed = candidate
    for _ in range(HALVINGS if failed is not None else 0):
        assert failed is not None
        low = 0.0 if best is None else best[0].groups_share
        between = sets_of([(low + failed.groups_share) / 2])
        if not between or between[0].saving >= failed.saving:
            break
        middle = between[0]
        if best is not None and middle.saving <= best[0].saving:
            break
        if (found := check(middle)) is not None:
            best = middle, found
        else:
            failed = middle
    return best


def points(curve: Sequence[tuple[Candidate, Fidelity]]) -> list[dict[str, Any]]:
    """A curve as plain data for the report."""
    return [
        {
            "name": candidate.name,
            **candidate.shares,
            "rank_fidelity": round(fidelity.pairwise_spearman, 4),
            "self_retrieval": round(fidelity.self_retrieval, 4),
            "centred_cosine": round(fidelity.centred_cosine, 4),
            **(
                {}
                if fidelity.task_change is None
                else {"task_change": round(fidelity.task_change, 4)}
            ),
        }
        for candidate, fidelity in curve
    ]


def table(damages: Damages, num_layers: int) -> list[list[float]]:
    """Damages as one list of KV groups per layer; empty for layers that cannot be served."""
    return [
        [round(damage, 6) for (at, _), damage in sorted(damages.items()) if at == layer]
        for layer in range(num_layers)
    ]


def every_layer(groups: Groups, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Groups by layer as a plan has them."""
    return tuple(groups.get(layer, ()) for layer in range(num_layers))


def error_bands(
    errors: Mapping[int, Sequence[float]], num_layers: int
) -> tuple[tuple[float, float], ...]:
    """Mean and deviation of the texts' errors, for every layer of a plan; 0 where none is."""
    return tuple(
        (round(fmean(errors[layer]), 5), round(pstdev(errors[layer]), 5))
        if layer in errors
        else (0.0, 0.0)
        for layer in range(num_layers)
    )
