"""What is wrong with a manifest: by KubeRay's CRDs, by Kubernetes' own schemas, and by the rules of
KubeRay's operator that no schema has."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.33"  # whose schemas the core kinds are held against


def validators(crds: Sequence[Path]) -> dict[str, jsonschema.Draft202012Validator]:
    """By kind, of ray.io/v1, from gzipped CRDs."""
    found = {}
    for file in crds:
        with gzip.open(file, "rt") as stream:
            crd = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        schema = _strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[crd["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON schema in which an unknown field is an error."""
    made = {key: value for key, value in schema.items() if key != "nullable"}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = _strict(schema[key])
    if "properties" in schema:
        made["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def problems(manifest: dict[str, Any], crds: dict[str, Any]) -> list[str]:
    """Everything that is wrong with it, by schema and by the operator's rules."""
    is_ray = manifest["apiVersion"].startswith("ray.io/")
    # A CRD does not describe its metadata: any core kind's schema does.
    core = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
    found = []
    try:
        kubernetes_validate.validate(core if is_ray else manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        found.append(str(error))
    if is_ray:
        assert manifest["apiVersion"] == "ray.io/v1"
        errors = crds[manifest["kind"]].iter_errors(manifest)
        found += [f"{'/'.join(map(str, error.path))}: {error.message}" for error in errors]
    return found or (list(_operator_problems(manifest)) if is_ray else [])


def _operator_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """The rules of KubeRay v1.7's ray-operator/controllers/ray/utils/validation.go that concern
    fields one might set here, and Kueue's."""
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name: {name}: not a DNS label of at most 47 characters"
    is_job = manifest["kind"] == "RayJob"
    if is_job:
        yield from _job_problems(spec)
    cluster = spec.get("rayClusterSpec", {}) if is_job else spec
    if cluster:
        yield from _cluster_problems(cluster)
    if is_job and cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth: not for a RayJob"
    if is_job and "upgradeStrategy" in cluster:
        yield "upgradeStrategy: not for a RayJob"
    if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {}):
        if cluster.get("enableInTreeAutoscaling") or len(cluster.get("workerGroupSpecs", [])) > 7:
            yield "queue: not with enableInTreeAutoscaling or more than 7 worker groups"
        if is_job and ("clusterSelector" in spec or not spec.get("shutdownAfterJobFinishes")):
            yield "queue: needs a cluster of its own and shutdownAfterJobFinishes"


def _job_problems(spec: dict[str, Any]) -> Iterator[str]:
    mode, selects = spec.get("submissionMode", "K8sJobMode"), "clusterSelector" in spec
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    if selects == ("rayClusterSpec" in spec):
        yield "give one of clusterSelector and rayClusterSpec"
    if spec.get("backoffLimit") and (selects or mode == "InteractiveMode"):
        yield "backoffLimit: not with clusterSelector or InteractiveMode"
    if spec.get("suspend") and (selects or not shuts_down):
        yield "suspend: needs a cluster of its own and shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished") and not shuts_down:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if shuts_down and "deletionRules" in spec.get("deletionStrategy", {}):
        yield "deletionRules: not with shutdownAfterJobFinishes"
    if mode == "SidecarMode":
        head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {})
        restart = head.get("template", {}).get("spec", {}).get("restartPolicy", "Never")
        if selects or {"submitterPodTemplate", "submitterConfig"} & {*spec} or restart != "Never":
            yield "SidecarMode: has no submitter, no clusterSelector and a head that never restarts"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "entrypoint: missing"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key}: not positive"
    for key in ("backoffLimit", "ttlSecondsAfterFinished"):
        if spec.get(key, 0) < 0:
            yield f"{key}: negative"


def _cluster_problems(cluster: dict[str, Any]) -> Iterator[str]:
    auth, autoscaling = cluster.get("authOptions", {}), cluster.get("enableInTreeAutoscaling")
    version = tuple(map(int, cluster.get("rayVersion", "0.0").split(".")[:2]))
    if auth.get("mode") == "token" and version < (2, 52):
        yield "authOptions: needs rayVersion 2.52"
    if auth.get("enableK8sTokenAuth") and ("secretName" in auth or auth.get("mode") != "token"):
        yield "enableK8sTokenAuth: needs mode token and no secretName"
    for gated in {"networkPolicy", "tlsOptions", "historyServerOptions"} & {*cluster}:
        yield f"{gated}: behind a feature gate"
    groups = [("head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    if len(dict(groups)) < len(groups):
        yield "workerGroupSpecs: two of one name"
    for group, part in groups:
        parameters, pod = part.get("rayStartParams", {}), part["template"]["spec"]
        if not pod.get("containers"):
            yield f"{group}: no containers"
            continue
        if "labels" in parameters:
            yield f"{group}: labels belong to the group, not to rayStartParams"
        label = r"([a-z0-9.-]+/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?=([A-Za-z0-9][\w.-]{0,62})?"
        for key, value in part.get("labels", {}).items():
            if not re.fullmatch(label, f"{key}={value}"):
                yield f"{group}: labels: {key}={value}"
        if part.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & {
            *parameters
        }:
            yield f"{group}: resources and rayStartParams say the same"
        if autoscaling and pod.get("restartPolicy", "Never") != "Never":
            yield f"{group}: restartPolicy: the autoscaler v2 needs Never"
        variables = {variable["name"] for variable in pod["containers"][0].get("env", [])}
        if forbidden := variables & {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS"}:
            yield f"{group}: {forbidden.pop()}: KubeRay has fields for it"
        if group != "head" and not part["minReplicas"] <= part["replicas"] <= part["maxReplicas"]:
            yield f"{group}: replicas: not between minReplicas and maxReplicas"
