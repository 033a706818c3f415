# SPDX-License-Identifier: Apache-2.0
"""Reuse of attention maps for prefill-only serving with vLLM."""

__version__ = "0.1.0"
