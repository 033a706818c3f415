# SPDX-License-Identifier: Apache-2.0
"""``attncache evaluate``: exact against reused answers, through the served endpoint."""
