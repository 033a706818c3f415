# SPDX-License-Identifier: Apache-2.0
"""The only entry point vLLM knows (``vllm.general_plugins``)."""


def register() -> None:
    """Teach vLLM the attention backend ``attncache``. Harmless to call any number of times.

    vLLM calls this in every process: the front end, the engine core and each worker. Nothing is
    loaded and nothing changes until the backend is selected.
    """
    from attncache_vllm.engine import compat

    compat.install()
