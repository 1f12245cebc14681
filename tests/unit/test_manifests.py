"""What is shipped for Kubernetes is valid, and fits the commands that it runs."""

from __future__ import annotations

import copy
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay import problems, validators

from listopd_ray.config import Config, load_config
from listopd_ray.job_config import SearchConfig, StudyConfig

ROOT = Path(__file__).parents[2]
K8S = ROOT / "jobs/k8s"
OVERLAYS = [K8S / "base", *sorted((K8S / "overlays").iterdir())]
SCHEMAS: dict[str, Any] = {"train": Config, "study": StudyConfig, "search": SearchConfig}
TOOLS = {"kubectl": ("kustomize",), "kustomize": ("build",)}


@functools.cache
def rendered(directory: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send. Read only."""
    tool = next(filter(shutil.which, TOOLS), None)
    if tool is None:
        pytest.skip("neither kubectl nor kustomize, which render overlays, is installed")
    done = subprocess.run([tool, *TOOLS[tool], directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=OVERLAYS, ids=lambda path: path.name)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rendered(request.param)


def gpu_job() -> dict[str, Any]:
    jobs = [m for m in rendered(K8S / "overlays/gpu") if m["kind"] == "RayJob"]
    return copy.deepcopy(jobs[0])


@pytest.fixture(scope="module")
def crds() -> dict[str, Any]:
    directory = os.environ.get("LISTOPD_CRDS", "")
    files = sorted(Path(directory).glob("ray.io_*.yaml.gz")) if directory else []
    if not files:
        pytest.skip("LISTOPD_CRDS names no directory with KubeRay's CRDs")
    return validators(files)


def test_every_manifest_is_valid(manifests: Any, crds: dict[str, Any]) -> None:
    kinds = Counter(manifest["kind"] for manifest in manifests)
    assert kinds["RayJob"] == 3 and kinds["RayCluster"] == 1 and kinds["NetworkPolicy"] == 1
    assert [found for manifest in manifests for found in problems(manifest, crds)] == []


def test_jobs_may_wait_in_a_queue(crds: dict[str, Any], tmp_path: Path) -> None:
    kustomization = {
        "resources": [os.path.relpath(K8S / "overlays/gpu", tmp_path.resolve())],
        "components": [os.path.relpath(K8S / "components/kueue", tmp_path.resolve())],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    for manifest in rendered(tmp_path):
        is_queued = "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {})
        assert is_queued == (manifest["kind"] == "RayJob")
        assert problems(manifest, crds) == []


CLUSTER = "spec/rayClusterSpec"
HEAD, WORKERS = f"{CLUSTER}/headGroupSpec", f"{CLUSTER}/workerGroupSpecs/0"
RULE = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 0}}
MISTAKES: list[tuple[dict[str, Any], str]] = [  # values by path in a RayJob; what is said
    ({"metadata/lables": {}}, "lables"),
    ({"metadata/name": "x" * 48}, "at most 47"),
    ({"spec/entryPoint": "listopd train"}, "entryPoint"),
    ({"spec/entrypoint": ""}, "entrypoint: missing"),
    ({"spec/backoffLimit": "three"}, "three"),
    ({"spec/backoffLimit": -1}, "backoffLimit: negative"),
    ({"spec/activeDeadlineSeconds": 0}, "activeDeadlineSeconds"),
    ({"spec/shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished"),
    ({"spec/shutdownAfterJobFinishes": False, "spec/suspend": True}, "suspend"),
    ({"spec/clusterSelector": {"ray.io/cluster": "listopd"}}, "give one of"),
    ({"spec/submissionMode": "InteractiveMode"}, "backoffLimit: not"),
    ({"spec/submissionMode": "SidecarMode"}, "SidecarMode"),
    ({"spec/deletionStrategy": {"deletionRules": [RULE]}}, "deletionRules: not"),
    ({"spec/submitterPodTemplate/spec/container": []}, "container"),
    ({f"{CLUSTER}/rayVersion": "2.51.0"}, "rayVersion"),
    ({f"{CLUSTER}/authOptions/mode": "tokens"}, "tokens"),
    ({f"{CLUSTER}/authOptions/secret": "x"}, "secret"),
    ({f"{CLUSTER}/authOptions/enableK8sTokenAuth": True}, "no secretName"),
    ({f"{CLUSTER}/authOptions/enableK8sTokenAuth": True}, "not for a RayJob"),
    ({f"{CLUSTER}/upgradeStrategy": {"type": "None"}}, "upgradeStrategy"),
    ({f"{CLUSTER}/networkPolicy": {}}, "feature gate"),
    ({f"{HEAD}/rayStartParam": {}}, "rayStartParam"),
    ({f"{HEAD}/resources": {"CPU": "1"}}, "say the same"),
    ({f"{HEAD}/template/spec/containers/0/volumeMount": []}, "volumeMount"),
    ({f"{HEAD}/template/spec/containers": []}, "no containers"),
    ({f"{HEAD}/template/spec/containers/0/env/0/name": "RAY_REDIS_ADDRESS"}, "REDIS"),
    ({f"{WORKERS}/replica": 2}, "replica"),
    ({f"{WORKERS}/maxReplicas": 0}, "not between"),
    ({f"{WORKERS}/groupName": "teacher"}, "two of one name"),
    ({f"{WORKERS}/rayStartParams/labels": "a=b"}, "belong to the group"),
    ({f"{WORKERS}/labels": {"a b": "c"}}, "labels: a b=c"),
    (
        {
            f"{CLUSTER}/enableInTreeAutoscaling": True,
            f"{WORKERS}/template/spec/restartPolicy": "Always",
        },
        "restartPolicy",
    ),
    (
        {
            "metadata/labels/kueue.x-k8s.io~1queue-name": "q",
            f"{CLUSTER}/enableInTreeAutoscaling": True,
        },
        "queue: not",
    ),
    (
        {
            "metadata/labels/kueue.x-k8s.io~1queue-name": "q",
            "spec/shutdownAfterJobFinishes": False,
            "spec/ttlSecondsAfterFinished": 0,
        },
        "queue: needs",
    ),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES)
def test_a_mistake_is_found(changes: dict[str, Any], said: str, crds: dict[str, Any]) -> None:
    job = gpu_job()
    for place, value in changes.items():
        *parents, key = (name.replace("~1", "/") for name in place.split("/"))
        part = job
        for parent in parents:
            part = part[int(parent)] if isinstance(part, list) else part[parent]
        part[key] = value
    assert any(said in found for found in problems(job, crds))


def test_a_mistake_in_a_core_kind_is_found(crds: dict[str, Any]) -> None:
    for manifest in copy.deepcopy(rendered(K8S / "base")):
        if not manifest["apiVersion"].startswith("ray.io/"):
            manifest.setdefault("spec", {})["podSelectors"] = {}
            assert problems(manifest, crds), manifest["kind"]


def pods(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every pod's spec, those of the operator's making included."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        cluster = spec.get("rayClusterSpec", spec)
        groups = [cluster["headGroupSpec"]] if "headGroupSpec" in cluster else []
        yield from (g["template"]["spec"] for g in groups + cluster.get("workerGroupSpecs", []))
        if manifest["kind"] == "RayJob":
            yield spec["submitterPodTemplate"]["spec"]
        elif manifest["kind"] == "Pod":
            yield spec


def test_every_pod_passes_the_restricted_standard_of_its_namespace(manifests: Any) -> None:
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert len(list(pods(manifests))) >= 1 + 4 * 2 + 3
    for pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["serviceAccountName"] == "listopd"
        assert [c["securityContext"] for c in pod["containers"]] == [confined]
        for volume in pod.get("volumes", []):
            assert {*volume} <= {"name", "emptyDir", "persistentVolumeClaim"}
    for manifest in manifests:
        spec = manifest.get("spec", {})
        assert spec.get("autoscalerOptions", {}).get("securityContext", confined) == confined


def test_every_ray_pod_has_the_token_the_shared_volume_and_shared_memory(manifests: Any) -> None:
    for manifest in manifests:
        if manifest["kind"] not in ("RayCluster", "RayJob"):
            continue
        cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        assert cluster["authOptions"] == {"mode": "token", "secretName": "listopd-ray-token"}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            assert {m["mountPath"] for m in container["volumeMounts"]} == {"/shared", "/dev/shm"}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            # A pod that goes leaves a checkpoint.
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 300
            (*_, script) = container["lifecycle"]["preStop"]["exec"]["command"]
            assert 'kill "${driver' in script and "listopd_ray" in script
            for variable in container["env"]:
                is_secret = re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])
                assert bool(is_secret) == ("secretKeyRef" in variable.get("valueFrom", {}))


def jobs(manifests: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(RayJob, its command, the configuration that the command reads)"""
    for manifest in manifests:
        if manifest["kind"] == "RayJob":
            bash, option, script = shlex.split(manifest["spec"]["entrypoint"])
            assert (bash, option) == ("bash", "-c")
            _, _, words = script.partition("exec listopd ")
            command, *arguments = shlex.split(words)
            files = [a.replace("/opt/listopd_ray", str(ROOT)) for a in arguments if "=" not in a]
            pairs = [a for a in arguments if "=" in a]
            yield manifest, command, load_config(SCHEMAS[command], files + pairs)


def test_a_job_is_tried_again_and_leaves_nothing_running(manifests: Any) -> None:
    specs = [manifest["spec"] for manifest in manifests if manifest["kind"] == "RayJob"]
    assert len(specs) == 3
    for job in specs:
        assert job["backoffLimit"] >= 1
        assert job["shutdownAfterJobFinishes"] is True
        assert min(job["ttlSecondsAfterFinished"], job["activeDeadlineSeconds"]) > 0


def test_only_the_namespace_and_the_operator_come_in(manifests: Any) -> None:
    (policy,) = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    assert policy["podSelector"] == {} and {*policy["policyTypes"]} == {"Ingress", "Egress"}
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {}}]}
    (source,) = operator["from"]
    assert source["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "kuberay-operator"
    }
    assert operator["ports"]


def test_an_entry_point_goes_on_by_itself_from_the_shared_volume(manifests: Any) -> None:
    for manifest, command, config in jobs(manifests):
        assert manifest["metadata"]["name"] == f"listopd-{command}"
        assert manifest["metadata"]["labels"]["listopd/part"] == command == config.name
        assert all(path.startswith("/shared/") for path in (config.out, config.cache))
        assert config.data.path in manifest["spec"]["entrypoint"].split("&&")[0]
        assert config.checkpoint.path is None and config.checkpoint.every > 0


def test_every_role_finds_room_in_the_worker_groups_with_its_labels(manifests: Any) -> None:
    for manifest, command, config in jobs(manifests):
        slots = getattr(config, command).slots if command != "train" else 1
        needed: Counter[tuple[Any, str]] = Counter()
        for role, count in (
            (config.learner, slots),
            (config.rollout, slots * config.rollout.num_workers),
            (config.scoring, config.scoring.num_actors),
        ):
            labels = tuple(sorted(role.labels.items()))
            needed[labels, "cpu"] += count * role.num_cpus
            needed[labels, "nvidia.com/gpu"] += count * role.num_gpus
        offered: Counter[tuple[Any, str]] = Counter()
        for group in manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            labels = tuple(sorted(group.get("labels", {}).items()))
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for resource in ("cpu", "nvidia.com/gpu"):
                offered[labels, resource] += group["replicas"] * int(limits.get(resource, 0))
        assert needed <= offered, f"{manifest['metadata']['name']}: {needed} of {offered}"
