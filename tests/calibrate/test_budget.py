# SPDX-License-Identifier: Apache-2.0
import pytest

from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.fidelity import Fidelity
from attncache_vllm.errors import SettingsError


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("rank=0.95,self-retrieval=0.9", Budget(0.95, 0.9)),
        (" self-retrieval=0.9 , rank=1", Budget(1.0, 0.9)),
        ("rank=0.5", Budget(0.5, None)),
        ("self_retrieval=0.5", Budget(None, 0.5)),
        ("task=0.003", Budget(None, None, 0.003)),
        ("rank=0.9,task=0", Budget(0.9, None, 0.0)),
        ("rank=0", Budget(0.0, None)),
    ],
)
def test_a_budget_is_read_and_what_is_left_out_is_not_asked(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget() == Budget(0.99, 0.99)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", ""),
        ("rank", "rank"),
        ("rank=", "rank="),
        ("rank=0.9,", ""),
        ("rank=high", "rank=high"),
        ("rank=1.01", "rank=1.01"),
        ("rank=0.9,self-retrieval=-0.1", "self-retrieval=-0.1"),
        ("rank=nan", "rank=nan"),
        ("cosine=0.9", "cosine=0.9"),
        ("rank=0.9;self-retrieval=0.9", "rank=0.9;self-retrieval=0.9"),
    ],
)
def test_a_mistake_is_named_with_the_rule(text: str, part: str) -> None:
    with pytest.raises(SettingsError, match="names among rank, self-retrieval") as caught:
        Budget.parse(text)
    assert str(caught.value).endswith(f"got {part!r}")


@pytest.mark.parametrize(
    ("rank", "found", "holds"),
    [(0.95, 0.9, True), (0.949, 1.0, False), (1.0, 0.899, False), (1.0, 1.0, True)],
)
def test_a_plan_must_keep_both_figures(rank: float, found: float, holds: bool) -> None:
    # The centred cosine has no part in it.
    fidelity = Fidelity(centred_cosine=0.0, pairwise_spearman=rank, self_retrieval=found)
    assert Budget(0.95, 0.9).holds(fidelity) is holds


@pytest.mark.parametrize(("change", "holds"), [(0.1, True), (-0.01, True), (-0.011, False)])
def test_a_tasks_metric_may_fall_by_as_much_as_is_said(change: float, holds: bool) -> None:
    budget = Budget(0.0, 0.0, task=0.01)
    assert budget.holds(Fidelity(0.0, 0.0, 0.0, change)) is holds
    with pytest.raises(ValueError, match="needs the task's metric, got None"):
        budget.holds(Fidelity(1.0, 1.0, 1.0))


def test_slack_is_that_of_the_worst_figure() -> None:
    assert Budget(0.9, 0.8).slack(Fidelity(0.0, 0.95, 0.7)) == pytest.approx(-0.1)
    assert Budget(0.9, 0.8).slack(Fidelity(0.0, 0.95, 1.0)) == pytest.approx(0.05)
    assert Budget(0.5, 0.5, 0.1).slack(Fidelity(0.0, 1.0, 1.0, -0.3)) == pytest.approx(-0.2)


def test_texts_of_no_task_are_asked_for_the_default_if_for_nothing_else() -> None:
    assert Budget(None, None, task=0.01).without_task() == Budget()
    assert Budget(0.9, None, task=0.01).without_task() == Budget(0.9, None)
    assert Budget(0.0, None).without_task() == Budget(0.0, None), "zero was asked"
    assert Budget(0.9, 0.8).without_task() == Budget(0.9, 0.8)


def test_a_budget_that_asks_for_nothing_holds_for_anything() -> None:
    assert Budget(None, None).holds(Fidelity(-1.0, -1.0, 0.0))
