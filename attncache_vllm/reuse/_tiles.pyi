# SPDX-License-Identifier: Apache-2.0
def supported() -> bool: ...
def multiply(
    cells: int,
    scales: int,
    columns: int,
    panels: int,
    value: int,
    scratch: int,
    out: int,
    groups: int,
    heads: int,
    panels_per_head: int,
    rows: int,
    length: int,
    width: int,
    value_group: int,
    value_row: int,
    out_group: int,
    out_head: int,
    out_row: int,
    /,
) -> None: ...
def tile(
    probs: int,
    length: int,
    dropped: float,
    cells: int,
    scales: int,
    columns: int,
    counts: int,
    /,
) -> int: ...
def prune(
    cells: int,
    scales: int,
    columns: int,
    panels: int,
    count: int,
    wide: int,
    dropped: float,
    /,
) -> int: ...
def sound(
    columns: int,
    scales: int,
    panels: int,
    count: int,
    panels_per_head: int,
    length: int,
    causal: bool,
    largest: int,
    /,
) -> bool: ...
