# SPDX-License-Identifier: Apache-2.0
"""Builds a store until it is killed, printing the number of entries after each commit."""

import sys
from pathlib import Path

from store_samples import NAMESPACE, make_features, make_record

from attncache_vllm.store import LocalStore


def main(path: Path) -> None:
    options = {"roll_bytes": 20_000}
    if (path / "manifest").exists():
        store = LocalStore.open(path, writable=True, **options)
    else:
        store = LocalStore.create(path, NAMESPACE, {}, **options)
    print(store.stats().entries, flush=True)
    while True:
        for _ in range(3):
            number = store.stats().entries
            store.put(make_record(number, map_bytes=700))
        if number % 5 == 0:
            entries = store.stats().entries
            name = b"%d" % entries
            features, artifacts = make_features(entries), {"templates": name}
            store.publish({"entries": entries}, name, {}, features, artifacts=artifacts)
        else:
            store.commit()
        print(store.stats().entries, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
