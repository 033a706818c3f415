# SPDX-License-Identifier: Apache-2.0
"""``python -m attncache_vllm``: the same as the command ``attncache``."""

from attncache_vllm.cli import app

app(prog_name="attncache")
