# SPDX-License-Identifier: Apache-2.0
"""Exit code 0 if what this container runs answers at the address in ``HEALTH``, else 1.

``http://HOST:PORT/PATH`` must answer 200; ``tcp://HOST:PORT`` must accept a connection. Standard
library only: it runs every few seconds, and must not import torch to say hello.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
from urllib.parse import urlsplit

_SECONDS = 4.0


def healthy(address: str) -> bool:
    """Whether ``address`` answers; ``ValueError`` if it is none."""
    url = urlsplit(address)
    if url.scheme not in ("http", "tcp") or url.hostname is None or url.port is None:
        raise ValueError(
            f"HEALTH must be http://HOST:PORT/PATH or tcp://HOST:PORT, got {address!r}"
        )
    try:
        if url.scheme == "tcp":
            socket.create_connection((url.hostname, url.port), _SECONDS).close()
            return True
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=_SECONDS)
        connection.request("GET", url.path or "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


if __name__ == "__main__":
    sys.exit(0 if healthy(os.environ.get("HEALTH", "")) else 1)
