"""Two hosts with nothing in common but a network, the installed packages and one shared directory.

Each is a network namespace with its own /tmp and /dev/shm: a path, an address or a file that one
silently takes from the other is missing there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from equality import check_equal

from listopd_ray.cluster import Cluster
from listopd_ray.config import Config, dump_config, with_values
from listopd_ray.job import distill
from listopd_ray.prepare import Prepared

ADDRESSES = {"a": "10.213.7.1", "b": "10.213.7.2"}
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "a" * 64

Shell = Callable[..., subprocess.Popen[str]]


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--net", "--mount", "true"]).returncode == 0


@pytest.fixture
def on_host(tmp_path: Path) -> Iterator[Shell]:
    """A function that starts a command on host a or b; `/mnt` is what they share."""
    if not can_make_hosts():
        pytest.skip("needs root, and ip and unshare with network namespaces")
    if Path("/tmp") in Path(__file__).parents:
        pytest.skip("hosts have a /tmp of their own, in which the project would be missing")
    names = {host: f"listopd-{os.getpid()}-{host}" for host in ADDRESSES}
    (tmp_path / "shared").mkdir()
    for host in ADDRESSES:
        (tmp_path / host).mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(host: str, *command: str) -> subprocess.Popen[str]:
        mounts = f"""
            mount --bind {tmp_path}/shared /mnt
            mount --bind {tmp_path}/{host} /tmp
            mount -t tmpfs tmpfs /dev/shm
            cd /tmp && exec "$@"
        """
        arguments = ["ip", "netns", "exec", names[host], "unshare", "--mount"]
        arguments += ["bash", "-euc", mounts, "bash", *command]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": "/tmp"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            arguments, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    try:
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "add", names[host]], check=True)
        veth = ["ip", "link", "add", "eth0", "netns", names["a"], "type", "veth"]
        subprocess.run([*veth, "peer", "eth0", "netns", names["b"]], check=True)
        for host, address in ADDRESSES.items():
            inside = ["ip", "-n", names[host]]
            subprocess.run([*inside, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
            for link in ("lo", "eth0"):
                subprocess.run([*inside, "link", "set", link, "up"], check=True)
        yield start
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=60)
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name])


# `listopd` on a cluster of two machines; says over how many a role's actors are spread.
DRIVER = """
import sys, ray
from listopd_ray.__main__ import main
from listopd_ray.config import Config
from listopd_ray.placement import Bundle, reserve

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
group = reserve(Config(), "two", [Bundle("rollout", {"GPU": 0.1})] * 2)
nodes = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
print("machines:", len({*nodes}))
ray.util.remove_placement_group(group)
main(sys.argv[2:])
"""


def test_a_run_on_two_hosts_shares_nothing_but_its_checkpoints(
    hf_config: Config, prepared: Prepared, hf_cluster: Cluster, on_host: Shell, tmp_path: Path
) -> None:
    """The learner and the teacher are on the host that has no data, no warm starts and no run
    directory, the rollout worker is on the other. The numbers are those of one machine."""
    config = dataclasses.replace(hf_config, name="near")
    distill(config, prepared, hf_cluster)
    host = tmp_path / "a"
    shutil.copytree(config.cache, host / "cache")
    shutil.copytree(str(config.data.path), host / "data")
    values = {"name": "far", "out": "/tmp/runs", "cache": "/tmp/cache", "data.path": "/tmp/data"}
    values |= {f"{role}.labels": {"place": "far"} for role in ("learner", "scoring")}
    values |= {"rollout.labels": {"place": "near"}, "checkpoint.path": "/mnt/checkpoints"}
    values |= {"rollout.num_cpus": 0, "rollout.num_gpus": 0.1}  # which host a has too
    (host / "far.yaml").write_text(dump_config(with_values(config, values)))

    head = f"{ADDRESSES['a']}:6379"
    options = {
        "a": "--head --port 6379 --include-dashboard false --num-cpus 0 --labels place=near",
        "b": f"--address {head} --num-cpus 2 --labels place=far",
    }
    for name, address in ADDRESSES.items():
        common = ["--node-ip-address", address, "--num-gpus", "1", "--block"]
        raylet = on_host(name, RAY, "start", *options[name].split(), *common)
        assert raylet.stdout is not None
        assert any("Ray runtime started" in line for line in raylet.stdout)

    def listopd(*arguments: str) -> str:
        driver = on_host("a", sys.executable, "-c", DRIVER, head, *arguments)
        output = driver.communicate(timeout=300)[0]
        assert driver.returncode == 0, output[-3000:]
        return output

    output = listopd("train", "/tmp/far.yaml")
    assert "machines: 2" in output.splitlines()
    check_equal(host / "runs" / "far", Path(config.out) / "near")
    assert {"runs", "cache", "data"}.isdisjoint(path.name for path in (tmp_path / "b").iterdir())
    copies = [path.parent.name for path in (tmp_path / "b").rglob("model.safetensors")]
    assert len(copies) == 2  # teacher and student, which is the base too
    # No machine but b has a CPU for Ray Train.
    listopd("warmstart", "/tmp/far.yaml", "student.warmstart.num_steps=3")
    assert len(list((host / "cache" / "warmstart").glob("*/model.safetensors"))) == 3
