"""Submit a command to a Ray cluster from Python, follow its log, and say what became of it.

    python jobs/submit.py [--submission-id ID] [--no-wait] train conf/demo.yaml name=mine lam=1.2

RAY_ADDRESS is the dashboard; the token is as Ray finds it. Exit status as of submit.sh: 0 succeeded
(or, with --no-wait, submitted), 1 failed or not submitted, 2 stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
EXIT_STATUS = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 2}
RUNTIME_ENV = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())


def submit(
    client: JobSubmissionClient, command: Sequence[str], submission_id: str | None = None
) -> str:
    """Start `listopd <command>` on the cluster; its submission id."""
    return client.submit_job(
        entrypoint=shlex.join(["python", "-m", "listopd_ray", *command]),
        submission_id=submission_id or f"listopd-{command[0]}-{time.time_ns()}",
        runtime_env={"working_dir": str(ROOT), **RUNTIME_ENV},
        metadata={"git": revision(), "command": command[0]},
        entrypoint_num_cpus=float(os.environ.get("ENTRYPOINT_NUM_CPUS", "0")),
    )


def revision() -> str:
    """What git calls this state; "unknown" without git or a repository."""
    describe = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError):
        done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"
    return "unknown"


async def follow(client: JobSubmissionClient, submission_id: str) -> JobStatus:
    """Print the job's log until it ends."""
    async for text in client.tail_job_logs(submission_id):
        print(text, end="", flush=True)
    while not (status := client.get_job_status(submission_id)).is_terminal():
        await asyncio.sleep(1)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--submission-id", help="a new one each time; by default made up")
    parser.add_argument("--no-wait", action="store_true", help="print the id and leave")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train conf/demo.yaml name=…")
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("which command? train, study, search, …")
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        parser.error(
            "RAY_ADDRESS: set it to the dashboard of the cluster, as http://127.0.0.1:8265"
        )
    try:
        client = JobSubmissionClient(address)
        submission_id = submit(client, arguments.command, arguments.submission_id)
        print(f"job {submission_id}", flush=True)
        if arguments.no_wait:
            return
        status = asyncio.run(follow(client, submission_id))
    except AuthenticationError as error:
        sys.exit(f"submit.py: {address}: {str(error).splitlines()[0]}")
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip(" .")]
        sys.exit(f"submit.py: {lines[-1]}")  # the server may quote its traceback
    print(f"job {submission_id}: {status.value.lower()}", file=sys.stderr)
    sys.exit(EXIT_STATUS[status])


if __name__ == "__main__":
    main()
