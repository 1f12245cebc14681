"""Processes and machines that end: the same command again, or the run itself, goes on."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from equality import check_equal

from listopd_ray.checkpoint import Checkpoints
from listopd_ray.cluster import Cluster
from listopd_ray.config import Config, dump_config
from listopd_ray.handles import LearnerHandle, Workers
from listopd_ray.job import distill
from listopd_ray.ledger import committed
from listopd_ray.prepare import Prepared
from listopd_ray.tracking import Run, read_jsonl

ROUNDS = int(os.environ.get("LISTOPD_CHAOS_ROUNDS", "1"))
SEED = int(os.environ.get("LISTOPD_CHAOS_SEED", "0"))

# `listopd train` that sends itself a signal before the n-th call of a function.
SCRIPT = """
import importlib, os, sys
module, owner, name, number, signum, *arguments = sys.argv[1:]
owner = getattr(importlib.import_module(module), owner)
original, left = getattr(owner, name), [int(number)]

def call(*arguments, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), int(signum))
    return original(*arguments, **options)

setattr(owner, name, call)
from listopd_ray.__main__ import main
main(["train", *arguments])
"""


@pytest.fixture(scope="module")
def small(hf_config: Config) -> Config:
    """Batches are drawn ahead."""
    return dataclasses.replace(
        hf_config,
        name="whole",
        num_steps=10,
        max_staleness=1,
        checkpoint=dataclasses.replace(hf_config.checkpoint, every=2),
        evaluation=dataclasses.replace(hf_config.evaluation, every=5),
    )


def train(
    config: Config, tmp_path: Path, *where: str, signum: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, on the tests' Ray cluster."""
    file = tmp_path / f"{config.name}.yaml"
    file.write_text(dump_config(config))
    place = [*(where or ("listopd_ray.train", "Loop", "_turn", "-1")), str(int(signum))]
    address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *place, str(file)],
        env=os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=300,
    )


PLACES = [
    (LearnerHandle, "step", 2),  # before an update; nothing is kept yet
    (LearnerHandle, "publish_weights", 5),  # after one
    (Run, "log", 2),  # before its row
    (Workers, "fetch", 3),  # while it samples
    (Checkpoints, "_move", 1),  # a checkpoint is written, and not renamed
]


class Killed(BaseException):
    """The end of a process, for whoever shares it."""


@pytest.fixture(scope="module")
def whole(small: Config, prepared: Prepared, hf_cluster: Cluster) -> Path:
    """A run that nothing happened to."""
    distill(small, prepared, hf_cluster)
    return Path(small.out) / small.name


of_chaos = pytest.mark.skipif(ROUNDS == 1, reason="of `make chaos`; test_train_faults has fakes")


@of_chaos
def test_a_run_that_ends_at_five_places_of_an_update_equals_the_undisturbed(
    small: Config, prepared: Prepared, hf_cluster: Cluster, whole: Path
) -> None:
    config = dataclasses.replace(small, name="ended")
    for owner, verb, number in PLACES:
        original, left = getattr(owner, verb), [number]

        def call(
            *arguments: Any, original: Any = original, left: Any = left, **options: Any
        ) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, verb, call)
            distill(config, prepared, hf_cluster)
    distill(config, prepared, hf_cluster)
    check_equal(Path(config.out) / "ended", whole)


@of_chaos
@pytest.mark.parametrize("place", [*range(5), "checkpoint"])
def test_a_run_whose_process_is_killed_and_then_terminated_equals_the_undisturbed(
    small: Config, whole: Path, tmp_path: Path, place: int | str
) -> None:
    config = dataclasses.replace(small, name=f"killed-{place}")
    directory = Path(config.out) / config.name
    if place == "checkpoint":
        owner, verb, number = Checkpoints, "_move", 3  # of the second: one is there already
    else:
        owner, verb, _ = PLACES[place]
        number = random.Random(f"{SEED}-{place}").randint(2, 8)
    done = train(config, tmp_path, owner.__module__, owner.__name__, verb, str(number))
    assert done.returncode == -signal.SIGKILL, done.stderr
    if place == "checkpoint":
        assert (directory / "checkpoints" / "LATEST").read_text() == "step-000002\n"
        assert (directory / "checkpoints" / "step-000004.tmp" / "manifest.json").exists()
    turn = ("listopd_ray.train", "Loop", "_turn", "2")
    done = train(config, tmp_path, *turn, signum=signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM
    newest = (directory / "checkpoints" / "LATEST").read_text().strip()
    step = int(newest.removeprefix("step-"))
    assert done.stderr.splitlines()[-1] == (
        f"listopd: interrupted by SIGTERM; checkpoint after update {step}: the same command goes on"
    )
    assert step < small.num_steps
    done = train(config, tmp_path)
    assert done.returncode == 0, done.stderr
    check_equal(directory, whole)


# A cluster of raylets: everything runs on a machine that is taken away, and goes on on another.
NODES = """
import sys, time
import ray
from ray.cluster_utils import Cluster
from listopd_ray.config import Config, load_config
from listopd_ray.job import train_job
from listopd_ray.tracking import Run

# Ray takes a machine for dead after 15 s; here sooner.
sooner = dict(health_check_period_ms=1000, health_check_failure_threshold=2)
head = dict(num_cpus=0, include_dashboard=False, _system_config=sooner)
machines = Cluster(initialize_head=True, head_node_args=head)
first = machines.add_node(num_cpus=4)
ray.init(address=machines.address, log_to_driver=False)
log, begun = Run.log, []

def log_and_remove(run, step, metrics):
    log(run, step, metrics)
    if step == 3 and not begun:
        machines.add_node(num_cpus=4)
        begun.append(time.monotonic())
        machines.remove_node(first, allow_graceful=False)
    elif begun and step == 4:
        print(f"next update after {time.monotonic() - begun[0]:.1f} s")

Run.log = log_and_remove
train_job(load_config(Config, sys.argv[1:]))
sys.stdout.flush()
ray.shutdown()
machines.shutdown()
"""


def test_a_run_survives_the_loss_of_the_machine_that_hosts_its_roles(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(small, name="machines", num_steps=6, max_staleness=0)
    file = tmp_path / "machines.yaml"
    file.write_text(dump_config(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", NODES, str(file)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with capsys.disabled():
        (said,) = [line for line in done.stdout.splitlines() if line.startswith("next update")]
        print(f"\nmachine removed: {said}", end="")
    directory = Path(config.out) / "machines"
    rows = read_jsonl(directory / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(7))
    assert rows[-1]["fault/learner_restarts"] >= 1
    assert rows[-1]["fault/rollout_restarts"] >= 1
    updates = committed(read_jsonl(directory / "ledger.jsonl"))
    assert list(updates) == [1, 2, 3, 4, 5, 6]
    for update, row in updates.items():
        assert {part["version"] for part in row["samples"]} == {update - 1}
