# SPDX-License-Identifier: Apache-2.0
"""Options of ``vllm serve`` that follow our own on the command line.

A store must be built, and a model examined, as it will be served: with the same dtype, the same
``--hf-overrides``. vLLM's own parser reads them, so none is missing and none is spelt otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def engine_args(model: str, options: Sequence[str]) -> EngineArgs:
    """vLLM's arguments for a pooling engine of ``model``; ``options`` as after ``vllm serve``.

    Unknown or malformed options end the process as they end ``vllm serve``: usage, message, exit
    code 2.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))
    return EngineArgs.from_cli_args(
        parser.parse_args(["--model", model, "--runner", "pooling", *options])
    )
