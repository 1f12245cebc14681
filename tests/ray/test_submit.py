"""What `jobs/` submits to a real Ray cluster with token authentication."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from listopd_ray.config import Config, dump_config
from listopd_ray.prepare import Prepared
from listopd_ray.tracking import read_jsonl

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPT, SDK = [str(JOBS / "train.sh")], [sys.executable, str(JOBS / "submit.py"), "train"]
TOKEN = "b" * 64

Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """To submit to a cluster of its own, made by the commands of jobs/README.md."""
    ports = free_ports(4)
    options = ["--port", "--dashboard-port", "--ray-client-server-port"]
    options += ["--dashboard-agent-listen-port"]
    arguments = [part for pair in zip(options, map(str, ports), strict=True) for part in pair]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    start = ["ray", "start", "--head", "--dashboard-host", "127.0.0.1", "--num-cpus", "4"]
    # Drivers of jobs find their cluster by a file in there: not the one of others on this machine.
    directory = tempfile.mkdtemp(prefix="ray-")  # short: sockets lie in it
    head = subprocess.Popen(
        [*start, "--block", "--temp-dir", directory, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{ports[1]}"
        environment["RAY_ADDRESS"] = address
        for _ in range(60):
            tried = subprocess.run(["ray", "job", "list"], env=environment, capture_output=True)
            if tried.returncode == 0:
                break
            time.sleep(1)
        yield environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def submit(environment: dict[str, str]) -> Submit:
    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="module")
def job(hf_config: Config, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file of a run that takes some seconds; its warm starts are there."""
    config = dataclasses.replace(hf_config, name="job", num_steps=24)
    file = tmp_path_factory.mktemp("job") / "job.yaml"
    file.write_text(dump_config(config))
    return file


def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    submit: Submit, environment: dict[str, str], hf_config: Config, job: Path
) -> None:
    run = Path(hf_config.out) / "job"
    script = subprocess.Popen(
        [*SCRIPT, str(job)],
        env=environment | {"SUBMISSION_ID": "to-be-stopped"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while script.poll() is None and len(read_jsonl(run / "metrics.jsonl")) < 4:
        time.sleep(0.1)
    stop = submit("ray", "job", "stop", "--no-wait", "to-be-stopped")
    assert stop.returncode == 0, stop.stderr
    said = script.communicate(timeout=120)[0]
    assert script.returncode == 2, said
    assert said.splitlines()[-1] == "job to-be-stopped: stopped; the same command goes on"
    assert "listopd: interrupted by SIGTERM; checkpoint after update" in said
    reached = int((run / "checkpoints" / "LATEST").read_text().strip().removeprefix("step-"))
    assert 0 < reached < 24
    before = read_jsonl(run / "metrics.jsonl")

    again = submit(*SDK, str(job))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "held-out prompts" in again.stdout  # the log is followed to its end, the table
    assert re.search(r"^job listopd-train-\d+: succeeded$", again.stderr, re.MULTILINE)
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["train/step"] for row in rows] == list(range(25))
    assert rows[:reached] == before[:reached]  # their seconds too: nothing was done again
    assert (run / "student" / "model.safetensors").is_file()

    once_more = submit(*SCRIPT, str(job))  # a retry that comes too late does no harm
    assert once_more.returncode == 0, once_more.stdout
    assert "held-out prompts" in once_more.stdout
    assert len(read_jsonl(run / "metrics.jsonl")) == 25


@pytest.mark.parametrize("command", [SCRIPT, SDK], ids=["script", "sdk"])
def test_a_job_that_fails_says_why_and_fails(submit: Submit, command: list[str]) -> None:
    done = submit(*command, "clip=0.5")
    assert done.returncode == 1
    assert "listopd: error: clip: c must be > 1" in done.stdout
    assert done.stderr.splitlines()[-1].endswith(": failed")


@pytest.mark.parametrize("command", [SCRIPT, SDK], ids=["script", "sdk"])
def test_a_wrong_token_or_no_cluster_is_one_clear_line(submit: Submit, command: list[str]) -> None:
    for variables, reason in (
        ({"RAY_AUTH_TOKEN": "c" * 64}, "invalid authentication token"),
        ({"RAY_ADDRESS": "http://127.0.0.1:9"}, "failed to connect to ray at address"),
    ):
        done = submit(*command, "clip=0.5", **variables)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert reason in line.lower()


@pytest.mark.parametrize("command", [["true"], SDK], ids=["script", "sdk"])
def test_a_submission_id_is_taken_once(submit: Submit, command: list[str]) -> None:
    again = "to-be-stopped"  # of the first test
    if command == SDK:
        done = submit(*SDK[:2], "--submission-id", again, "train", "clip=0.5")
    else:
        done = submit(*SCRIPT, "clip=0.5", SUBMISSION_ID=again)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert again in line
    assert "exists already" in line or "already exists" in line
