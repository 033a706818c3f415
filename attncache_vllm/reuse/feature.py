# SPDX-License-Identifier: Apache-2.0
"""The feature of a sequence: a small vector whose L2 distances predict distances of maps.

As in AttnCache (arXiv 2510.25979): the hidden states at the feature layer are pooled over the
tokens, then projected by a small network that is trained as one half of a Siamese pair.
"""

from __future__ import annotations

import json
import math

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

# One metadata entry, as safetensors writes several in random order and equal weights must give
# equal bytes.
_SIZES = "hidden_size slots width dim"


def pool_tokens(hidden: Tensor, slots: int) -> Tensor:
    """Average the tokens of one sequence into `slots` consecutive, nearly equal parts.

    Slot `i` is the mean of the tokens `floor(i * L / slots)` to `ceil((i + 1) * L / slots)`, so
    neighbouring slots may share a token, and a sequence shorter than `slots` repeats some.

    Args:
        hidden: `[L, D]`, any float dtype, `L >= 1`.
        slots: number of parts.

    Returns:
        `[slots, D]` float32.

    Raises:
        ValueError: `hidden` is not 2-D, has no token, or `slots` is below 1.
    """
    if hidden.ndim != 2 or not len(hidden) or slots < 1:
        raise ValueError(
            "pooling needs hidden [L, D] with L >= 1 and slots >= 1, "
            f"got {tuple(hidden.shape)!r} and {slots!r}; pass one whole sequence"
        )
    length = len(hidden)
    parts = [hidden[i * length // slots : -(-(i + 1) * length // slots)] for i in range(slots)]
    return torch.stack([part.mean(0, dtype=torch.float32) for part in parts])


class Projector(nn.Module):
    """Pooled hidden states to feature: RMS norm per slot, linear, ReLU, linear, in float32.

    The norm makes the feature independent of the scale of a model's hidden states.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, hidden_size: int, slots: int = 8, width: int = 256, dim: int = 128) -> None:
        super().__init__()
        sizes = (hidden_size, slots, width, dim)
        if min(sizes) < 1:
            raise ValueError(f"{_SIZES} must each be at least 1, got {sizes!r}")
        self.hidden_size, self.slots, self.width, self.dim = sizes
        self.inner = nn.Linear(slots * hidden_size, width, dtype=torch.float32)
        self.outer = nn.Linear(width, dim, dtype=torch.float32)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map `[B, slots, hidden_size]` of any float dtype to `[B, dim]` float32.

        Raises:
            ValueError: the shape is another.
        """
        hidden: Tensor = self.inner(self.normalised(pooled))
        feature: Tensor = self.outer(hidden.relu())
        return feature

    def normalised(self, pooled: Tensor) -> Tensor:
        """The input of the first linear layer, `[B, slots * hidden_size]` float32."""
        if pooled.shape[1:] != (self.slots, self.hidden_size):
            raise ValueError(
                f"pooled must be [B, {self.slots}, {self.hidden_size}], "
                f"got {tuple(pooled.shape)!r}; use the projector trained for this model"
            )
        pooled = pooled.float()
        rms = pooled.square().mean(-1, keepdim=True).sqrt()
        return (pooled / rms.clamp_min(1e-12)).flatten(1)

    def to_bytes(self) -> bytes:
        """The weights and sizes in safetensors format."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        sizes = f"{self.hidden_size} {self.slots} {self.width} {self.dim}"
        return safetensors.torch.save(tensors, metadata={_SIZES: sizes})

    @classmethod
    def from_bytes(cls, data: bytes) -> Projector:
        """Rebuild what `to_bytes` wrote; shapes are checked before the module is built.

        Raises:
            ValueError: not safetensors, or sizes, names, shapes, dtypes or values do not fit.
        """
        try:
            tensors = safetensors.torch.load(data)
            # `load` has validated the header: its length in 8 bytes, then JSON.
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            hidden_size, slots, width, dim = map(int, header["__metadata__"][_SIZES].split())
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"a projector must be safetensors with the metadata {_SIZES!r}, "
                f"got {error!r}; train it again"
            ) from error
        expected = {
            "inner.weight": (width, slots * hidden_size),
            "inner.bias": (width,),
            "outer.weight": (dim, width),
            "outer.bias": (dim,),
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected or min(hidden_size, slots, width, dim) < 1:
            raise ValueError(
                f"this projector must hold {expected!r}, got {found!r}; train it again"
            )
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not math.isfinite(tensor.abs().sum().item()):
                raise ValueError(
                    f"{name} must be finite float32, got {tensor.dtype!r}; train it again"
                )
        projector = cls(hidden_size, slots, width, dim)
        projector.load_state_dict(tensors)
        return projector.eval()
