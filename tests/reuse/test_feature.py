# SPDX-License-Identifier: Apache-2.0
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.feature import Projector, pool_tokens


@settings(deadline=None)
@given(length=st.integers(1, 70), slots=st.integers(1, 20))
def test_pooling_is_adaptive_averaging_for_any_length(length: int, slots: int) -> None:
    hidden = torch.randn(length, 5, generator=torch.Generator().manual_seed(length))
    expected = torch.nn.functional.adaptive_avg_pool1d(hidden.T[None], slots)[0].T
    torch.testing.assert_close(pool_tokens(hidden, slots), expected)


def test_pooling_keeps_the_order_of_the_tokens() -> None:
    hidden = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    assert pool_tokens(hidden, 2).tolist() == [[2.0], [6.0]]


def test_pooling_averages_half_precision_in_float32() -> None:
    hidden = torch.full((4096, 1), 100.0, dtype=torch.float16)  # the sum overflows float16
    assert pool_tokens(hidden, 1).tolist() == [[100.0]]


@pytest.mark.parametrize(("shape", "slots"), [((0, 4), 2), ((4,), 2), ((1, 4, 4), 2), ((4, 4), 0)])
def test_pooling_refuses_what_is_no_sequence(shape: tuple[int, ...], slots: int) -> None:
    with pytest.raises(ValueError, match="pooling needs hidden"):
        pool_tokens(torch.zeros(shape), slots)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
def test_features_do_not_depend_on_the_scale_of_hidden_states(scale: float) -> None:
    projector, pooled = Projector(16, slots=4), torch.randn(3, 4, 16)
    torch.testing.assert_close(projector(pooled * scale), projector(pooled))


def test_each_slot_is_scaled_by_itself() -> None:
    projector, pooled = Projector(16, slots=4), torch.randn(3, 4, 16)
    louder = pooled * torch.tensor([1.0, 100.0, 1.0, 0.01]).view(4, 1)
    torch.testing.assert_close(projector(louder), projector(pooled))


def test_silent_hidden_states_give_a_finite_feature() -> None:
    assert Projector(16)(torch.zeros(1, 8, 16)).isfinite().all()


def test_a_projector_survives_its_bytes() -> None:
    projector, pooled = Projector(16, slots=4, width=32, dim=8), torch.randn(5, 4, 16)
    copy = Projector.from_bytes(projector.to_bytes())
    assert (copy.hidden_size, copy.slots, copy.width, copy.dim) == (16, 4, 32, 8)
    assert not copy.training
    assert copy(pooled).shape == (5, 8)
    assert torch.equal(copy(pooled), projector(pooled))
    assert copy.to_bytes() == projector.to_bytes()


def test_a_batch_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 4, 16\]"):
        Projector(16, slots=4)(torch.zeros(2, 4, 17))


def test_empty_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must each be at least 1"):
        Projector(16, width=0)


def stored(sizes: str = "6 2 4 3", **tensors: torch.Tensor | None) -> bytes:
    """The bytes of a small projector with some sizes or tensors replaced (None: left out)."""
    projector = Projector(6, slots=2, width=4, dim=3)
    kept = {
        name: tensor
        for name, tensor in ({**projector.state_dict(), **tensors}).items()
        if tensor is not None
    }
    return safetensors.torch.save(kept, metadata={"hidden_size slots width dim": sizes})


def test_the_helper_of_the_next_test_stores_a_valid_projector() -> None:
    Projector.from_bytes(stored())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not safetensors at all",
        stored()[:-1],
        stored("6 3 4 3"),
        stored("-6 -2 4 3"),
        stored("0 2 4 3", **{"inner.weight": torch.zeros(4, 0)}),
        stored("6 2 wide 3"),
        stored("6 2 4"),
        stored("99999999999 2 4 3"),
        stored(**{"outer.bias": None}),
        stored(**{"extra": torch.zeros(1)}),
        stored(**{"outer.bias": torch.zeros(3, dtype=torch.float64)}),
        stored(**{"outer.bias": torch.tensor([0.0, float("nan"), 0.0])}),
        stored(**{"inner.weight": torch.full((4, 12), float("inf"))}),
        safetensors.torch.save(Projector(6, slots=2, width=4, dim=3).state_dict()),
    ],
)
def test_bytes_that_are_no_projector_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="train it again"):
        Projector.from_bytes(data)
