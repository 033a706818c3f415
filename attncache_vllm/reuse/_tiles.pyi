# SPDX-License-Identifier: Apache-2.0
def supported() -> bool: ...
def interleave(
    value: int, stride: int, length: int, width: int, padded: int, out: int, /
) -> None: ...
def multiply(
    cells: int,
    scales: int,
    columns: int,
    panels: int,
    values: int,
    out: int,
    width: int,
    heads: int,
    panels_per_head: int,
    length: int,
    head_stride: int,
    row_stride: int,
    /,
) -> None: ...
def tile(
    probs: int,
    length: int,
    dropped_mass: float,
    cells: int,
    scales: int,
    columns: int,
    counts: int,
    /,
) -> int: ...
