# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes manifest against what Kubernetes, KubeRay, Ray and the settings take."""

from __future__ import annotations

import http.server
import importlib.util
import json
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml
from deploy_samples import (
    CONFIG,
    GUIDE,
    IMAGE,
    MANIFEST,
    PODS,
    ROOT,
    SERVER_SETTINGS,
    STORE_SETTINGS,
    Answers,
    Json,
    named,
)
from kubernetes_schema import JOB, MAP, NAME, SPECS, TEXT, fields

from attncache_vllm.config import Settings
from attncache_vllm.store.ray.settings import ClusterSettings

LOCK = dict(
    line.split("==") for line in (ROOT / "requirements" / "cpu.txt").read_text().split() if line
)

# -- the manifest -----------------------------------------------------------------------------

STORE = named("RayCluster", "attncache-store")
HEAD = STORE["spec"]["headGroupSpec"]

(WORKERS,) = STORE["spec"]["workerGroupSpecs"]

CONTAINERS = [
    container
    for pod in PODS
    for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
]

RAY_CONTAINERS = [group["template"]["spec"]["containers"][0] for group in (HEAD, WORKERS)]

(SERVER,) = named("Deployment", "attncache-server")["spec"]["template"]["spec"]["containers"]


def label_of(pod: Json) -> str:
    label: str = pod["metadata"]["labels"]["app.kubernetes.io/name"]
    return label


def mount_of(container: Json, path: str) -> Json:
    """The mount that a path in a container is on."""
    mounts = [
        m for m in container["volumeMounts"] if PurePosixPath(path).is_relative_to(m["mountPath"])
    ]
    (found,) = mounts
    return dict(found)


def gib(size: str) -> int:
    assert size.endswith("Gi"), size
    return int(size.removesuffix("Gi"))


@pytest.mark.parametrize("resource", MANIFEST, ids=lambda r: f"{r['kind']}-{r['metadata']['name']}")
def test_resources_have_the_fields_that_their_apis_take(resource: Json) -> None:
    about = {
        "apiVersion": TEXT,
        "kind": TEXT,
        "metadata": fields("name", "labels", name=NAME, labels=MAP),
    }
    if resource["kind"] == "ConfigMap":
        schema = fields(*about, "data", **about, data=MAP)
    else:
        spec = SPECS[resource["apiVersion"], resource["kind"]]
        schema = fields(*about, "spec", **about, spec=spec)
    jsonschema.validate(resource, schema, cls=jsonschema.Draft202012Validator)


def test_the_schema_refuses_what_is_misspelt() -> None:
    job = json.loads(json.dumps(named("Job", "attncache-store-load")["spec"]))
    jsonschema.validate(job, JOB)
    job["template"]["spec"]["containers"][0]["comand"] = ["true"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, JOB)


def test_names_are_given_once() -> None:
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in MANIFEST]
    assert len(set(names)) == len(names)
    # KubeRay makes names of services from it, which have at most 63 characters.
    assert len(STORE["metadata"]["name"]) <= 53


def test_pods_are_alike_where_they_are_written_alike() -> None:
    (pod_security,) = {json.dumps(pod["spec"]["securityContext"]) for pod in PODS}
    assert json.loads(pod_security)["runAsUser"] == 1000
    assert {container["image"] for container in CONTAINERS} == {IMAGE}
    assert {container["imagePullPolicy"] for container in CONTAINERS} == {"IfNotPresent"}


def test_every_container_has_rays_token_from_the_secret_of_the_guide() -> None:
    tokens = {json.dumps(container["env"][:2]) for container in CONTAINERS}
    (token,) = tokens
    mode, value = json.loads(token)
    assert mode == {"name": "RAY_AUTH_MODE", "value": "token"}
    secret = value["valueFrom"]["secretKeyRef"]
    assert value["name"] == "RAY_AUTH_TOKEN"
    assert f"create secret generic {secret['name']}" in GUIDE
    assert f"--from-literal={secret['key']}=" in GUIDE


def test_what_pods_mount_is_a_volume_and_volumes_are_here_or_in_the_guide() -> None:
    here = {(resource["kind"], resource["metadata"]["name"]) for resource in MANIFEST}
    for pod in PODS:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        mounted = {
            mount["name"]
            for container in CONTAINERS
            if container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
            for mount in container["volumeMounts"]
        }
        assert mounted == set(volumes), label_of(pod)
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in here
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in here or f"`{claim}`" in GUIDE
            if "secret" in volume:
                assert f"create secret generic {volume['secret']['secretName']}" in GUIDE


def test_the_root_of_containers_is_read_only_but_ray_and_vllm_can_write_where_they_do() -> None:
    for container in CONTAINERS:
        for path in ("/tmp", "/home/attncache"):
            assert "readOnly" not in mount_of(container, path)


def test_selectors_find_pods() -> None:
    pods = [
        pod["metadata"]["labels"]
        | (
            # What KubeRay adds.
            {"ray.io/cluster": "attncache-store", "ray.io/node-type": kind}
            if (
                kind := {id(HEAD["template"]): "head", id(WORKERS["template"]): "worker"}.get(
                    id(pod)
                )
            )
            else {}
        )
        for pod in PODS
    ]
    for resource in MANIFEST:
        spec = resource.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if selector is not None:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= labels.items() for labels in pods), resource["metadata"]


# -- Ray --------------------------------------------------------------------------------------


def test_ray_is_that_of_the_lock() -> None:
    assert STORE["spec"]["rayVersion"] == LOCK["ray"]


def test_ray_pods_are_probed_without_the_dashboard_that_the_lock_does_not_have() -> None:
    # KubeRay adds probes of the dashboard where there are none, and they would never succeed.
    assert "aiohttp-cors" not in LOCK, "the lock has ray[default] now: KubeRay's own probes will do"
    for container in RAY_CONTAINERS:
        for probe in ("readinessProbe", "livenessProbe"):
            assert "tcpSocket" in container[probe]
    head_ports = {port["name"]: port["containerPort"] for port in RAY_CONTAINERS[0]["ports"]}
    assert RAY_CONTAINERS[0]["readinessProbe"]["tcpSocket"]["port"] == head_ports["client"]
    assert RAY_CONTAINERS[0]["livenessProbe"]["tcpSocket"]["port"] == head_ports["gcs-server"]
    raylet = int(WORKERS["rayStartParams"]["node-manager-port"])
    for probe in ("readinessProbe", "livenessProbe"):
        assert RAY_CONTAINERS[1][probe]["tcpSocket"]["port"] == raylet


def test_ray_params_are_options_of_ray_start() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "scripts" / "scripts.py").read_text()
    for group in (HEAD, WORKERS):
        for name in group["rayStartParams"]:
            assert f'"--{name}"' in source
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert HEAD["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_rays_ports_are_closed_but_to_the_store_and_one_to_its_clients() -> None:
    within = named("NetworkPolicy", "attncache-store")["spec"]
    clients = named("NetworkPolicy", "attncache-store-clients")["spec"]
    own = {"ray.io/cluster": STORE["metadata"]["name"]}
    assert within["podSelector"]["matchLabels"] == own
    assert within["policyTypes"] == ["Ingress", "Egress"]
    assert within["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
    assert clients["podSelector"]["matchLabels"] == {**own, "ray.io/node-type": "head"}
    (rule,) = clients["ingress"]
    (peer,) = rule["from"]
    (port,) = rule["ports"]
    assert port == {"port": 10001, "protocol": "TCP"}
    allowed = peer["podSelector"]["matchLabels"].items()
    for pod in PODS:
        is_ray = pod is HEAD["template"] or pod is WORKERS["template"]
        assert (allowed <= pod["metadata"]["labels"].items()) != is_ray, label_of(pod)


# -- settings ---------------------------------------------------------------------------------


def test_the_servers_settings_are_settings() -> None:
    settings = Settings.model_validate(SERVER_SETTINGS)
    # What a server keeps in memory fits beside the rest.
    assert 2 * settings.resident_bytes < gib(SERVER["resources"]["limits"]["memory"]) << 30


def test_servers_and_jobs_come_in_by_the_heads_service() -> None:
    ports = {port["name"]: port["containerPort"] for port in RAY_CONTAINERS[0]["ports"]}
    address = f"ray://{STORE['metadata']['name']}-head-svc:{ports['client']}"
    assert SERVER_SETTINGS["store"] == STORE_SETTINGS["address"] == address


def test_the_stores_settings_are_settings() -> None:
    ClusterSettings.model_validate(STORE_SETTINGS)


@pytest.mark.parametrize("name", ["ray-local.yaml", "ray-cluster.yaml"])
def test_the_stores_settings_are_those_of_the_examples(name: str) -> None:
    known = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert set(STORE_SETTINGS) <= set(known)


def test_shards_find_their_folder_key_room_and_cores() -> None:
    worker = RAY_CONTAINERS[1]
    volumes = {volume["name"]: volume for volume in WORKERS["template"]["spec"]["volumes"]}
    claim = volumes[mount_of(worker, STORE_SETTINGS["folder"])["name"]]["persistentVolumeClaim"]
    volume = named("PersistentVolumeClaim", claim["claimName"])["spec"]
    # Ray starts a shard on any worker: each must see what any other has written.
    assert volume["accessModes"] == ["ReadWriteMany"]
    needed = STORE_SETTINGS["shards"] * STORE_SETTINGS["shard_mib"]
    assert needed < gib(volume["resources"]["requests"]["storage"]) * 1024
    assert 1 <= STORE_SETTINGS["replicas"] <= STORE_SETTINGS["shards"]
    key = PurePosixPath(STORE_SETTINGS["key_file"])
    secret = volumes[mount_of(worker, str(key))["name"]]["secret"]["secretName"]
    assert f"create secret generic {secret} --from-file={key.name}=" in GUIDE
    # With one pod lost the shards still have their cores.
    cores = (WORKERS["replicas"] - 1) * int(worker["resources"]["limits"]["cpu"])
    assert cores >= STORE_SETTINGS["shards"] * STORE_SETTINGS["num_cpus"]


def test_only_workers_have_the_key_of_entries() -> None:
    holders = [
        label_of(pod)
        for pod in PODS
        for volume in pod["spec"].get("volumes", [])
        if "secret" in volume and pod is not WORKERS["template"]
    ]
    assert not holders


# -- commands ---------------------------------------------------------------------------------

STORE_COMMANDS = [c["command"] for c in CONTAINERS if c.get("command", [""])[0] == "attncache"]


def test_the_shards_are_brought_up_before_they_are_loaded() -> None:
    spec = named("Job", "attncache-store-load")["spec"]["template"]["spec"]
    assert [c["command"][1:3] for c in spec["initContainers"]] == [["store", "up"]]
    assert [c["command"][1:3] for c in spec["containers"]] == [["store", "load"]]


@pytest.mark.parametrize("command", STORE_COMMANDS, ids=" ".join)
def test_commands_of_the_store_are_ones_of_the_cli(command: list[str]) -> None:
    from typer.main import get_command

    from attncache_vllm.cli import app

    found: Any = get_command(app)
    words = command[1:]
    while hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    found.make_context(None, words)  # an option that there is not would be an error


def test_settings_that_commands_name_are_mounted() -> None:
    for container in CONTAINERS:
        for path in re.findall(r"/etc/attncache/settings/[\w.]+", json.dumps(container)):
            if path == mount_of(container, path)["mountPath"]:
                continue
            assert PurePosixPath(path).name in CONFIG
    assert {"server.yaml", "store.yaml"} == set(CONFIG)


def test_servers_are_started_as_the_readme_says() -> None:
    *_, script = SERVER["command"]
    words = shlex.split(script.replace("\\\n", " "))
    assert words[words.index("vllm") + 1] == "serve"
    assert words[words.index("--attention-backend") + 1] == "attncache"
    assert json.loads(words[words.index("--additional-config") + 1]) == {
        "attncache": "/etc/attncache/settings/server.yaml"
    }
    readme = (ROOT / "README.md").read_text()
    own = {"--served-model-name", "--host", "--port"}
    assert all(word in readme for word in words if word.startswith("--") and word not in own)
    (port,) = SERVER["ports"]
    assert words[words.index("--port") + 1] == str(port["containerPort"])
    (service,) = named("Service", "attncache-server")["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (port["containerPort"], port["name"])


# -- the health check -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
