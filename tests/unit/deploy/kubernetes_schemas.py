"""Closed JSON schemas of what the YAML files for Kubernetes use: a name that is not of the API, or of another type, is
an error. They cover no more than that. (The files have passed kubernetes-validate 1.34 and 1.37 as well, pod templates
of the Ray clusters included; it is too large to be a dependency.)
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
INT: Schema = {"type": "integer"}
BOOL: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def closed(required: str = "", **properties: Schema) -> Schema:
    """An object with these properties and no others; `required` are names, separated by spaces."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


META = closed("name", name=TEXT, labels=TEXTS)
PROBE = closed(
    "httpGet",
    httpGet=closed("path port", path=TEXT, port={"type": ["string", "integer"]}),
    periodSeconds=INT,
    timeoutSeconds=INT,
    failureThreshold=INT,
)
ENV = closed(
    "name",
    name=TEXT,
    value=TEXT,
    valueFrom=closed("secretKeyRef", secretKeyRef=closed("name key", name=TEXT, key=TEXT)),
)
CONTAINER = closed(
    "name image resources",
    name=TEXT,
    image=TEXT,
    args=list_of(TEXT),
    env=list_of(ENV),
    ports=list_of(closed("containerPort", containerPort=INT, name=TEXT)),
    resources=closed("requests", requests=TEXTS, limits=TEXTS),
    startupProbe=PROBE,
    readinessProbe=PROBE,
    livenessProbe=PROBE,
    volumeMounts=list_of(closed("name mountPath", name=TEXT, mountPath=TEXT, readOnly=BOOL)),
)
VOLUME = closed(
    "name",
    name=TEXT,
    persistentVolumeClaim=closed("claimName", claimName=TEXT, readOnly=BOOL),
)
POD_TEMPLATE = closed(
    "spec",
    metadata=closed(labels=TEXTS),
    spec=closed(
        "containers",
        containers=list_of(CONTAINER),
        volumes=list_of(VOLUME),
        terminationGracePeriodSeconds=INT,
        securityContext=closed(runAsNonRoot=BOOL, runAsUser=INT, runAsGroup=INT),
    ),
)
SELECTOR = closed("matchLabels", matchLabels=TEXTS)

# Of KubeRay 1.7: ray-operator/apis/ray/v1/raycluster_types.go and rayservice_types.go.
HEAD_GROUP = closed("rayStartParams template", rayStartParams=TEXTS, template=POD_TEMPLATE, serviceType=TEXT)
WORKER_GROUP = closed(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=INT,
    minReplicas=INT,
    maxReplicas=INT,
    numOfHosts=INT,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
)
RAY_CLUSTER_SPEC = closed(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=closed(idleTimeoutSeconds=INT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}),
    authOptions=closed("mode", mode={"enum": ["token", "disabled"]}),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=list_of(WORKER_GROUP),
)


def resource(api_version: str, kind: str, spec: Schema) -> Schema:
    """A whole document."""
    names = {"apiVersion": {"const": api_version}, "kind": {"const": kind}}
    return closed("apiVersion kind metadata spec", **names, metadata=META, spec=spec)


SCHEMAS = {
    "Deployment": resource(
        "apps/v1",
        "Deployment",
        closed(
            "replicas selector template",
            replicas=INT,
            selector=SELECTOR,
            strategy=closed(
                "type",
                type={"enum": ["RollingUpdate", "Recreate"]},
                rollingUpdate=closed(maxSurge=INT, maxUnavailable=INT),
            ),
            template=POD_TEMPLATE,
        ),
    ),
    "Service": resource(
        "v1",
        "Service",
        closed(
            "selector ports",
            selector=TEXTS,
            ports=list_of(closed("port", name=TEXT, port=INT, targetPort={"type": ["string", "integer"]})),
        ),
    ),
    "PodMonitor": resource(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        closed(
            "selector podMetricsEndpoints",
            selector=SELECTOR,
            podMetricsEndpoints=list_of(closed("port", port=TEXT, path=TEXT, interval=TEXT)),
        ),
    ),
    "RayCluster": resource("ray.io/v1", "RayCluster", RAY_CLUSTER_SPEC),
    "RayService": resource(
        "ray.io/v1",
        "RayService",
        closed("serveConfigV2 rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER_SPEC),
    ),
}
