# SPDX-License-Identifier: Apache-2.0
"""Claim: the input of a later layer predicts the distance of maps better than the paper's first.

For each feature layer a store is built from the same news articles, and the projector's figures on
entries it never saw are reported: ``python -m benchmarks.feature_layer``. Not a timing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from attncache_vllm.store.manifest import Manifest
from benchmarks.assets import ensure
from benchmarks.corpus import news


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 4, 10, 20])
    parser.add_argument("--entries", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("build/feature_layer"))
    options = parser.parse_args()
    model = ensure("smollm2")
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = options.out / "corpus.jsonl"
    texts = news(options.entries, min_chars=2000)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    results = []
    for layer in options.layers:
        store = options.out / f"store-{layer}"
        shutil.rmtree(store, ignore_errors=True)
        command = [
            *(sys.executable, "-m", "attncache_vllm", "build", str(model)),
            *("--corpus", str(corpus), "--store", str(store)),
            *("--max-tokens", str(options.tokens), "--feature-layer", str(layer)),
        ]
        with (options.out / f"build-{layer}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        published = Manifest.read(store).published
        assert published is not None
        figures = {
            "feature_layer": layer,
            **{key: value for key, value in published.report.items() if key != "curve"},
        }
        results.append(figures)
        print(figures, flush=True)
        shutil.rmtree(store)
    report = {
        "model": model.name,
        "entries": options.entries,
        "tokens": options.tokens,
        "layers_reused": "20-29",
        "results": results,
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
