# SPDX-License-Identifier: Apache-2.0
"""Settings of a cluster: the examples are valid, and every mistake is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from attncache_vllm.errors import SettingsError
from attncache_vllm.store.ray.settings import MIB, ClusterSettings, load_cluster_settings
from attncache_vllm.store.ray.shard import Limits

CONFIGS = Path(__file__).parents[3] / "configs"
GIVEN = {"shards": 2, "folder": "/entries", "shard_mib": 8}


def loaded(tmp_path: Path, **changes: Any) -> ClusterSettings:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(GIVEN | changes))
    return load_cluster_settings(path)


def test_the_examples_are_valid_and_the_local_one_names_every_key() -> None:
    local = load_cluster_settings(CONFIGS / "ray-local.yaml")
    assert (local.address, local.cluster) == ("local", "127.0.0.1:6379")
    named = yaml.safe_load((CONFIGS / "ray-local.yaml").read_text())
    assert set(named) == set(ClusterSettings.model_fields)
    cluster = load_cluster_settings(CONFIGS / "ray-cluster.yaml")
    assert (cluster.cluster, cluster.replicas) == ("auto", 2)


def test_limits_are_in_bytes(tmp_path: Path) -> None:
    assert loaded(tmp_path).limits == Limits(8 * MIB)
    found = loaded(tmp_path, tenant_mib=3, ttl_s=60.0)
    assert found.limits == Limits(8 * MIB, 3 * MIB, 60.0)


def test_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = loaded(tmp_path, folder="entries", key_file="key")
    assert (found.folder, found.key_file) == (tmp_path / "entries", tmp_path / "key")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": 0}, "setting 'shards': input should be greater than or equal to 1, got 0"),
        ({"shards": "2"}, "setting 'shards': input should be a valid integer, got '2'"),
        ({"replicas": 3}, "replicas must be at most the 2 shards"),
        ({"ttl_s": 0}, "setting 'ttl_s'"),
        ({"authentication": "none"}, "setting 'authentication'"),
        ({"shard_gib": 1}, "unknown setting 'shard_gib', got 1; known: address, port"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, **change)
    assert message in str(caught.value)
    assert "cluster.yaml" in str(caught.value)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("- shards")
    with pytest.raises(SettingsError, match="must be an object of keys and values"):
        load_cluster_settings(tmp_path / "cluster.yaml")
