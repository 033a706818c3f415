# SPDX-License-Identifier: Apache-2.0
"""The model that is calibrated: vLLM in this process, with a hand on what its layers serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attncache_vllm.calibrate.edits import Tokens
from attncache_vllm.engine.memory import keep_freed_memory
from attncache_vllm.errors import AttnCacheError, SettingsError
from attncache_vllm.serve_options import engine_args

# The texts that corrections are fitted on run in one step of at most so many tokens and sequences.
STEP_TOKENS = 32768
STEP_SEQUENCES = 2048
KV_CACHE_BYTES = 4 * 2**30


def model_config(model: str, serve_options: Sequence[str]) -> Any:
    """vLLM's configuration of a model, with ``max_model_len`` resolved.

    Raises:
        SettingsError: vLLM cannot serve it for pooling.
    """
    try:
        return engine_args(model, serve_options).create_model_config()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the model must be a folder or a hub name that vLLM can serve for pooling, got "
            f"{model!r}: {str(error).splitlines()[0]}"
        ) from None


class CalibratedModel:
    """Answers of the model for token ids, with the calibrator that says what its layers serve."""

    def __init__(
        self, model: str, store: Path, max_tokens: int, serve_options: Sequence[str]
    ) -> None:
        """Start the engine, for texts of ``max_tokens`` or as many as the model takes.

        Raises:
            SettingsError, StoreError: the options do not make an engine, or the store is not that
                of the model.
        """
        # One process: the driver and the layers work on the same objects.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # No front end beside it needs a core of its own.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        keep_freed_memory()
        from vllm import LLM

        from attncache_vllm.engine import calibrate

        self.max_tokens = min(max_tokens, int(model_config(model, serve_options).max_model_len))
        arguments = engine_args(model, serve_options)
        arguments.enable_prefix_caching = False
        arguments.enable_chunked_prefill = False
        arguments.max_model_len = self.max_tokens
        arguments.max_num_batched_tokens = max(STEP_TOKENS, self.max_tokens)
        arguments.max_num_seqs = STEP_SEQUENCES
        arguments.kv_cache_memory_bytes = KV_CACHE_BYTES
        arguments.enforce_eager = True
        arguments.attention_backend = "attncache"
        arguments.additional_config = {"attncache": {"store": str(store), "calibrate": True}}
        try:
            self._llm: Any = LLM.from_engine_args(arguments)
        except RuntimeError as error:
            raise AttnCacheError(f"vLLM could not start to calibrate: {error}") from None
        self.calibrator = calibrate.active()
        self.config: Any = self._llm.model_config

    def tokenize(self, text: str, pair: str | None, max_tokens: int) -> Tokens:
        """Token ids int32 ``[L]``, cut as a tokenizer does it: special tokens at the end stay."""
        max_length = min(max_tokens, self.max_tokens)
        ids = self._llm.get_tokenizer()(
            text, pair, truncation=True, max_length=max_length
        ).input_ids
        return torch.tensor(ids, dtype=torch.int32).numpy()

    def special_tokens(self) -> set[int]:
        """Ids that stand for no text."""
        return set(self._llm.get_tokenizer().all_special_ids)

    def run(self, texts: Sequence[Tokens]) -> Tensor:
        """The model's answers float32 ``[N, D]``.

        Raises:
            SettingsError: the model does not answer with one vector for each text.
        """
        prompts = [{"prompt_token_ids": tokens.tolist()} for tokens in texts]
        outputs = self._llm.encode(prompts, pooling_task=self._llm.pooling_task, use_tqdm=False)
        answers = [output.outputs.data.float().cpu() for output in outputs]
        if any(answer.ndim != 1 or answer.shape != answers[0].shape for answer in answers):
            raise SettingsError(
                "calibration needs a model that answers with one vector for each text, got shapes "
                f"like {tuple(answers[0].shape)}; calibrate with --convert embed"
            )
        return torch.stack(answers)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
