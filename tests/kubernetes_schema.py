# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of what the manifest's resources may hold, as far as it uses them: no field that the
APIs of Kubernetes and KubeRay do not have, none twice, none misspelt."""

from __future__ import annotations

from typing import Any

from deploy_samples import Json

TEXT: Json = {"type": "string", "minLength": 1}
NAME: Json = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
COUNT: Json = {"type": "integer", "minimum": 0}
PORT: Json = {"type": "integer", "minimum": 1, "maximum": 65535}
SWITCH: Json = {"type": "boolean"}
MAP: Json = {"type": "object", "additionalProperties": {"type": "string"}}
SIZE: Json = {"type": "string", "pattern": "^[0-9]+(m|Ki|Mi|Gi)?$"}


def fields(*required: str, **known: Json) -> Json:
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


def some(item: Json) -> Json:
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: Any) -> Json:
    return {"enum": list(values)}


def either(*schemas: Json) -> Json:
    return {"oneOf": list(schemas)}


SELECTOR = fields("matchLabels", matchLabels=MAP)
PROBE_TIMES = dict.fromkeys(
    ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"), COUNT
)

PROBE = either(
    fields("tcpSocket", tcpSocket=fields("port", port=PORT), **PROBE_TIMES),
    fields("httpGet", httpGet=fields("path", "port", path=TEXT, port=NAME), **PROBE_TIMES),
)

ENV = either(
    fields("name", "value", name=TEXT, value=TEXT),
    fields(
        "name",
        "valueFrom",
        name=TEXT,
        valueFrom=fields("secretKeyRef", secretKeyRef=fields("name", "key", name=NAME, key=TEXT)),
    ),
)

AMOUNTS = fields("cpu", "memory", cpu=SIZE, memory=SIZE)
CONTAINER = fields(
    "name",
    "image",
    "securityContext",
    "env",
    "resources",
    name=NAME,
    image=TEXT,
    imagePullPolicy=one_of("IfNotPresent", "Always"),
    securityContext=fields(
        "allowPrivilegeEscalation",
        "readOnlyRootFilesystem",
        "capabilities",
        allowPrivilegeEscalation=one_of(False),
        readOnlyRootFilesystem=one_of(True),
        capabilities=fields("drop", drop=one_of(["ALL"])),
    ),
    command=some(TEXT),
    env=some(ENV),
    ports=some(fields("containerPort", name=NAME, containerPort=PORT)),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    resources=fields(
        "requests", "limits", requests=AMOUNTS, limits=fields("memory", cpu=SIZE, memory=SIZE)
    ),
    volumeMounts=some(
        fields("name", "mountPath", name=NAME, mountPath=TEXT, readOnly=one_of(True))
    ),
)

VOLUME = either(
    fields("name", "emptyDir", name=NAME, emptyDir=fields(medium=one_of("Memory"), sizeLimit=SIZE)),
    fields("name", "configMap", name=NAME, configMap=fields("name", name=NAME)),
    fields(
        "name", "secret", name=NAME, secret=fields("secretName", secretName=NAME, defaultMode=COUNT)
    ),
    fields(
        "name",
        "persistentVolumeClaim",
        name=NAME,
        persistentVolumeClaim=fields("claimName", claimName=NAME, readOnly=SWITCH),
    ),
)

POD = fields(
    "automountServiceAccountToken",
    "securityContext",
    "containers",
    automountServiceAccountToken=one_of(False),
    restartPolicy=one_of("Never", "OnFailure"),
    securityContext=fields(
        "runAsNonRoot",
        "runAsUser",
        "seccompProfile",
        runAsNonRoot=one_of(True),
        runAsUser=COUNT,
        runAsGroup=COUNT,
        fsGroup=COUNT,
        fsGroupChangePolicy=one_of("OnRootMismatch"),
        seccompProfile=fields("type", type=one_of("RuntimeDefault")),
    ),
    topologySpreadConstraints=some(
        fields(
            "maxSkew",
            "topologyKey",
            "whenUnsatisfiable",
            "labelSelector",
            maxSkew=COUNT,
            topologyKey=TEXT,
            whenUnsatisfiable=one_of("ScheduleAnyway", "DoNotSchedule"),
            labelSelector=SELECTOR,
        )
    ),
    initContainers=some(CONTAINER),
    containers=some(CONTAINER),
    volumes=some(VOLUME),
)

TEMPLATE = fields(
    "metadata", "spec", metadata=fields("labels", labels=MAP, annotations=MAP), spec=POD
)

JOB = fields(
    "template",
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    template={
        **TEMPLATE,
        "properties": {
            **TEMPLATE["properties"],
            "spec": {**POD, "required": [*POD["required"], "restartPolicy"]},
        },
    },
)

PEER = either(
    fields("podSelector", podSelector=SELECTOR),
    fields("namespaceSelector", namespaceSelector=SELECTOR),
)

POLICY_PORTS = some(fields("port", "protocol", port=PORT, protocol=one_of("TCP", "UDP")))
SPECS: dict[tuple[str, str], Json] = {
    ("v1", "PersistentVolumeClaim"): fields(
        "accessModes",
        "resources",
        accessModes=some(one_of("ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany")),
        storageClassName=NAME,
        resources=fields("requests", requests=fields("storage", storage=SIZE)),
    ),
    ("v1", "Service"): fields(
        "selector",
        "ports",
        selector=MAP,
        ports=some(fields("port", name=NAME, port=PORT, targetPort=NAME)),
    ),
    ("apps/v1", "Deployment"): fields(
        "selector",
        "template",
        replicas=COUNT,
        selector=SELECTOR,
        strategy=fields(
            "rollingUpdate", rollingUpdate=fields(maxUnavailable=COUNT, maxSurge=COUNT)
        ),
        template=TEMPLATE,
    ),
    ("batch/v1", "Job"): JOB,
    ("batch/v1", "CronJob"): fields(
        "schedule",
        "jobTemplate",
        schedule={"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
        concurrencyPolicy=one_of("Allow", "Forbid", "Replace"),
        successfulJobsHistoryLimit=COUNT,
        failedJobsHistoryLimit=COUNT,
        jobTemplate=fields("spec", spec=JOB),
    ),
    ("policy/v1", "PodDisruptionBudget"): fields(
        "maxUnavailable", "selector", maxUnavailable=COUNT, selector=SELECTOR
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): fields(
        "podSelector",
        "policyTypes",
        podSelector=SELECTOR,
        policyTypes=some(one_of("Ingress", "Egress")),
        ingress=some(fields("from", **{"from": some(PEER), "ports": POLICY_PORTS})),
        egress=some(fields("to", to=some(PEER), ports=POLICY_PORTS)),
    ),
    ("ray.io/v1", "RayCluster"): fields(
        "rayVersion",
        "headGroupSpec",
        "workerGroupSpecs",
        rayVersion=TEXT,
        headGroupSpec=fields("rayStartParams", "template", rayStartParams=MAP, template=TEMPLATE),
        workerGroupSpecs=some(
            fields(
                "groupName",
                "replicas",
                "minReplicas",
                "maxReplicas",
                "rayStartParams",
                "template",
                groupName=NAME,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=MAP,
                template=TEMPLATE,
            )
        ),
    ),
}
