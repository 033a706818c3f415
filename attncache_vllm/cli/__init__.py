# SPDX-License-Identifier: Apache-2.0
"""The command ``attncache``.

Exit codes: 0 done; 1 the answer is bad news (damage found, not ready); 2 a mistake in the call or
its inputs, said in one line; 130 interrupted.
"""

# Each module adds its commands to the app when it is imported.
from attncache_vllm.cli import build, calibrate, cluster, doctor, evaluate, stores  # noqa: F401
from attncache_vllm.cli.common import app

__all__ = ["app"]
