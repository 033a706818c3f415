# SPDX-License-Identifier: Apache-2.0
"""Linear corrections: what a layer's heads would have said, predicted from what reused maps say.

A map of another text errs in a systematic way, and a linear map from the outputs of all heads of
a token, and its own values, takes much of that back. It folds into the output projection, which
then takes the values as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from attncache_vllm.reuse.plan import SOURCES, Source


@dataclass(frozen=True, eq=False)
class Correction:
    """Add ``[x, v] @ weight + bias`` to the outputs of the heads whose maps were reused.

    Attributes:
        heads: query heads that are corrected, ascending.
        weight: ``[H * d + KV * d, len(heads) * d]``, from the outputs x of all heads of a token and
            its own values v to the corrected heads.
        bias: ``[len(heads) * d]``.
    """

    heads: tuple[int, ...]
    weight: Tensor
    bias: Tensor

    @property
    def head_size(self) -> int:
        return len(self.bias) // len(self.heads)

    def columns(self) -> Tensor:
        """Where the corrected heads lie among the ``H * d`` outputs ``[len(heads) * d]``, int64."""
        size = self.head_size
        first = torch.tensor(self.heads, device=self.bias.device) * size
        return (first[:, None] + torch.arange(size, device=self.bias.device)).flatten()

    def apply_(self, heads_out: Tensor, value: Tensor) -> None:
        """Correct ``heads_out`` ``[T, H * d]`` in place; ``value`` is ``[T, KV, d]``."""
        given = torch.cat([heads_out, value.flatten(1)], 1)
        heads_out[:, self.columns()] += torch.addmm(self.bias, given, self.weight)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight ``[out, H * d + KV * d]`` and bias ``[out]`` of the output projection after the
        correction; it takes ``[x, v]``.

        With C_x and C_v the correction as matrices to all heads and c its bias,
        ``W (x + C_x^T x + C_v^T v + c) + b = (W + W C_x^T) x + W C_v^T v + (W c + b)``. Computed in
        float32, returned in the dtype of ``weight``.
        """
        corrected = weight.float()[:, self.columns()]
        folded = corrected @ self.weight.float().T
        folded[:, : weight.shape[1]] += weight.float()
        shift = corrected @ self.bias.float()
        if bias is not None:
            shift = shift + bias.float()
        return folded.to(weight.dtype), shift.to(weight.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Correction:
        return Correction(self.heads, self.weight.to(device, dtype), self.bias.to(device, dtype))


@dataclass(frozen=True, eq=False)
class FitSums:
    """What a correction is fitted from, summed over tokens; the sums of other tokens add to it.

    The fit minimises ``sum_t n_t |w_t (y_t - x_t - C^T [x_t, v_t] - c)|^2 + lambda |C|^2`` over the
    reused heads, with ``w_t = 1 / |y_t|``: a token counts ``n_t``, however large its row, where a
    few huge ones (the first token's) would otherwise decide. ``lambda`` is ``ridge`` times the mean
    diagonal of the weighted ``[X, V]^T [X, V]``, so that ``ridge`` has no unit.

    Attributes:
        heads: query heads whose maps were reused.
        gram: ``[n + 1, n + 1]`` float32, of the ``n = H * d + KV * d`` weighted inputs and a one.
        moment: ``[n + 1, len(heads) * d]`` float32, of those and what the reused heads lack.
    """

    heads: tuple[int, ...]
    gram: Tensor
    moment: Tensor

    @classmethod
    def of(
        cls,
        reused: Tensor,
        value: Tensor,
        exact: Tensor,
        counts: Tensor,
        heads: tuple[int, ...],
        head_size: int,
    ) -> FitSums:
        """Sum over some tokens.

        Args:
            reused: ``[T, H * d]``, x, outputs of all heads with reused maps.
            value: ``[T, KV, d]``, v, the tokens' own values.
            exact: ``[T, H * d]``, y, the outputs that the same tokens have in the exact model.
            counts: ``[T]``, n, how much each token counts.
            heads: query heads whose maps were reused.
            head_size: d.

        Raises:
            ValueError: the shapes disagree, or there are no tokens or no heads.
        """
        if (
            reused.shape != exact.shape
            or reused.ndim != 2
            or not len(reused)
            or value.ndim != 3
            or len(value) != len(reused)
            or counts.shape != reused.shape[:1]
            or not heads
        ):
            raise ValueError(
                "a correction is fitted on [T, H * d], [T, KV, d], [T, H * d] and [T] of the same "
                f"tokens for at least one head, got {tuple(reused.shape)!r}, "
                f"{tuple(value.shape)!r}, {tuple(exact.shape)!r} and {tuple(counts.shape)!r} for "
                f"{heads!r}"
            )
        x, y = reused.float(), exact.float()
        weight = counts.float().sqrt()[:, None] / y.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        columns = (torch.tensor(heads)[:, None] * head_size + torch.arange(head_size)).flatten()
        lacking = (y - x)[:, columns] * weight
        given = torch.cat([x, value.float().flatten(1), torch.ones_like(weight)], 1) * weight
        return cls(tuple(heads), given.T @ given, given.T @ lacking)

    def __add__(self, other: FitSums) -> FitSums:
        return FitSums(self.heads, self.gram + other.gram, self.moment + other.moment)

    def solve(self, ridge: float) -> Correction:
        """The correction, held small by ``ridge``.

        Raises:
            ValueError: ``ridge`` is not above 0.
        """
        if not ridge > 0:
            raise ValueError(f"a correction needs a ridge above 0, got {ridge!r}")
        gram, size = self.gram.double(), len(self.gram) - 1
        inputs = gram.diagonal()[:size]
        inputs += ridge * inputs.mean()
        gram[size, size] += (
            1e-6 * gram[size, size]
        )  # the bias is free, but the matrix stays regular
        solution = torch.linalg.solve(gram, self.moment.double()).float()
        return Correction(self.heads, solution[:size].contiguous(), solution[size].contiguous())


Corrections = dict[tuple[Source, int], Correction]


def corrections_to_bytes(corrections: Mapping[tuple[Source, int], Correction]) -> bytes:
    """Safetensors of corrections by source and layer, in bfloat16."""
    tensors: dict[str, Tensor] = {}
    heads = {}
    for (source, layer), correction in corrections.items():
        name = f"{source}.{layer}"
        tensors[f"{name}.weight"] = correction.weight.to(torch.bfloat16).contiguous()
        tensors[f"{name}.bias"] = correction.bias.to(torch.bfloat16).contiguous()
        heads[name] = list(correction.heads)
    data: bytes = save_tensors(tensors, {"heads": json.dumps(heads)})
    return data


def corrections_from_bytes(
    data: bytes, num_heads: int, num_kv_heads: int, head_size: int
) -> Corrections:
    """Read corrections; nothing about ``data`` is trusted.

    Raises:
        ValueError: the data are not corrections for such heads.
    """
    corrections: Corrections = {}
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, heads in json.loads(header["__metadata__"]["heads"]).items():
            source, _, layer = name.partition(".")
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            size = len(heads) * head_size
            own = [head for head in range(num_heads) if head in heads]
            if (
                source not in SOURCES
                or not heads
                or heads != own
                or {type(head) for head in heads} != {int}
                or not weight.dtype == bias.dtype == torch.bfloat16
                or weight.shape != ((num_heads + num_kv_heads) * head_size, size)
                or bias.shape != (size,)
                or not bool(weight.isfinite().all() and bias.isfinite().all())
            ):
                raise ValueError(f"{name}: heads {heads!r}, weight {tuple(weight.shape)!r}")
            corrections[source, int(layer)] = Correction(tuple(heads), weight, bias)
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"these are not corrections of a model with {num_heads} heads of {head_size} and "
            f"{num_kv_heads} KV heads: "
            f"{error!r}; calibrate again"
        ) from None
    return corrections
