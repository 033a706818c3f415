# SPDX-License-Identifier: Apache-2.0
"""The algorithm in plain torch: features, matching, plans, map codec and map application.

Nothing here imports vLLM, Ray or the store, and every rejected input is a `ValueError`.
"""
