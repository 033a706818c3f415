# SPDX-License-Identifier: Apache-2.0
"""Whose a request is, and whose an entry. Light: every process of an engine imports it."""

from __future__ import annotations

import hashlib
from typing import Final

# Whose a request without a ``cache_salt`` is, and every entry that its owner put into a folder.
SHARED_TENANT: Final = ""


def tenant_of(cache_salt: str | None) -> str:
    """The tenant of a request with this ``cache_salt``: 32 hex digits, or the shared one without.

    A salt is a secret of its tenant: what is sent and kept is its SHA-256, and only that.
    """
    if not cache_salt:
        return SHARED_TENANT
    # JSON can carry half of a surrogate pair, which plain UTF-8 refuses.
    return hashlib.sha256(cache_salt.encode("utf-8", "surrogatepass")).hexdigest()[:32]
