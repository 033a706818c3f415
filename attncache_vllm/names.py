# SPDX-License-Identifier: Apache-2.0
"""Names that settings and commands share. Nothing is imported here: help must be quick."""

from __future__ import annotations

from typing import Literal

# Those of `attncache_vllm.reuse.codecs`.
CodecName = Literal["tiles-u8-lse", "visible-bf16-lse"]
