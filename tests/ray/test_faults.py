"""Roles of a real run are killed: it goes on, and ends where an undisturbed one ends.

The kills are at random moments of a phase; LISTOPD_CHAOS_ROUNDS says how many of each kind
(`make chaos`), LISTOPD_CHAOS_SEED where the dice begin.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from equality import check_equal, metrics_of

from listopd_ray.cluster import Cluster
from listopd_ray.config import Config
from listopd_ray.handles import LearnerHandle, Workers
from listopd_ray.job import distill
from listopd_ray.ledger import committed
from listopd_ray.prepare import Prepared
from listopd_ray.supervision import Faults
from listopd_ray.teacher_pool import TeacherPool
from listopd_ray.tracking import Run, read_jsonl
from listopd_ray.types import ListopdError

ROUNDS = int(os.environ.get("LISTOPD_CHAOS_ROUNDS", "1"))
SEED = int(os.environ.get("LISTOPD_CHAOS_SEED", "0"))


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


class Killer:
    """Kills the process that is at work in a phase of an update, at a random moment of it."""

    def __init__(self, patch: pytest.MonkeyPatch, plan: dict[int, str]) -> None:
        """`plan`: update → phase."""
        self.plan = plan
        self.dice = random.Random(SEED)
        self.kills: list[tuple[int, str, float]] = []  # update, phase, when
        self.seconds: list[float] = []  # from each kill to the next update that is done
        self._update = 0
        self._lasts: dict[str, float] = {}  # s that the phase took last time
        load = Workers.load_weights

        def load_and_fail(workers: Workers, weights: Any) -> dict[str, float]:
            if self._is_due("poison"):
                del self.plan[self._update + 1]
                actor = workers._team.actors[0]
                broken = actor.__ray_call__.remote(
                    lambda worker: setattr(worker._engine, "load_weights", None)
                )
                ray.get(broken)
                self.kills.append((self._update + 1, "poison", time.monotonic()))
            return load(workers, weights)

        patch.setattr(Workers, "load_weights", load_and_fail)
        phases: list[tuple[type, str, str, Callable[[Any], Any]]] = [
            (Workers, "generate", "generate", lambda w: w._team.actors[0]),
            (Workers, "load_weights", "load", lambda w: w._team.actors[0]),
            (TeacherPool, "score", "score", lambda t: t._team.actors[0]),
            (LearnerHandle, "step", "before step", lambda handle: handle._ranks[0]),
        ]
        for owner, verb, phase, actor_of in phases:
            self._wrap(patch, owner, verb, phase, actor_of)
        step, log = LearnerHandle.step, Run.log

        def step_and_die(handle: LearnerHandle, *arguments: Any) -> Any:
            metrics = step(handle, *arguments)
            if self._is_due("after step"):
                del self.plan[self._update + 1]
                self._kill(pid_of(handle._ranks[0]), "after step", 0.0)
            return metrics

        def log_and_time(run: Run, number: int, metrics: dict[str, float]) -> None:
            log(run, number, metrics)
            self._update = number
            if len(self.seconds) < len(self.kills):
                self.seconds.append(time.monotonic() - self.kills[-1][2])

        patch.setattr(LearnerHandle, "step", step_and_die)
        patch.setattr(Run, "log", log_and_time)

    def _is_due(self, phase: str) -> bool:
        return self.plan.get(self._update + 1) == phase

    def _wrap(
        self,
        patch: pytest.MonkeyPatch,
        owner: type,
        verb: str,
        phase: str,
        actor_of: Callable[[Any], Any],
    ) -> None:
        original = getattr(owner, verb)

        def call(handle: Any, *arguments: Any, **options: Any) -> Any:
            if self._is_due(phase):
                pid = pid_of(actor_of(handle))  # while it is idle
                delay = self.dice.uniform(0, self._lasts.get(phase, 0.02))
                del self.plan[self._update + 1]
                threading.Thread(target=self._kill, args=(pid, phase, delay)).start()
            start = time.monotonic()
            result = original(handle, *arguments, **options)
            self._lasts[phase] = max(0.02, time.monotonic() - start)
            return result

        patch.setattr(owner, verb, call)

    def _kill(self, pid: int, phase: str, delay: float) -> None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        self.kills.append((self._update + 1, phase, time.monotonic()))


PHASES = ("generate", "load", "poison", "score", "before step", "after step")  # poison: no death


@pytest.fixture(scope="module")
def long_config(config: Config) -> Config:
    faults = dataclasses.replace(config.faults, backoff_s=0.1, max_restarts=100)
    steps = 2 + 2 * len(PHASES) * ROUNDS
    checkpoint = dataclasses.replace(config.checkpoint, every=3)
    evaluation = dataclasses.replace(config.evaluation, every=0)
    return dataclasses.replace(
        config, num_steps=steps, faults=faults, checkpoint=checkpoint, evaluation=evaluation
    )


@pytest.fixture(scope="module")
def mortal(cluster: Cluster, long_config: Config) -> Iterator[Cluster]:
    """The shared engines, of which many may die."""
    before = dict(vars(cluster.faults))
    vars(cluster.faults).update(vars(Faults(long_config.faults)))
    yield cluster
    vars(cluster.faults).update(before)


@pytest.fixture(scope="module")
def undisturbed(long_config: Config, prepared: Prepared, mortal: Cluster) -> Path:
    whole = dataclasses.replace(long_config, name="undisturbed")
    distill(whole, prepared, mortal)
    return Path(whole.out) / whole.name


def test_roles_may_be_killed_at_any_moment(
    long_config: Config,
    prepared: Prepared,
    mortal: Cluster,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chaos = dataclasses.replace(long_config, name="chaos")
    phases = [phase for _ in range(ROUNDS) for phase in PHASES]
    random.Random(SEED).shuffle(phases)
    killer = Killer(monkeypatch, {2 + 2 * n: phase for n, phase in enumerate(phases)})
    distill(chaos, prepared, mortal)
    directory = Path(chaos.out) / chaos.name
    with capsys.disabled():
        for (update, phase, _), seconds in zip(killer.kills, killer.seconds, strict=True):
            print(f"\nupdate {update}: {phase}: next update after {seconds:.1f} s", end="")
    assert sorted(phase for _, phase, _ in killer.kills) == sorted(phases)
    updates = committed(read_jsonl(directory / "ledger.jsonl"))  # no gap, nothing twice
    assert list(updates) == list(range(1, chaos.num_steps + 1))
    attempts = 0
    for update, row in updates.items():
        for part in row["samples"]:
            assert part["version"] == update - 1  # what was drawn again too: the current weights
            attempts += part["attempt"]
    assert attempts > 0
    counts = read_jsonl(directory / "metrics.jsonl")[-1]
    assert counts["fault/teacher_restarts"] == ROUNDS
    assert counts["fault/learner_restarts"] == 2 * ROUNDS
    assert counts["fault/rollout_restarts"] >= 3 * ROUNDS
    check_equal(directory, undisturbed)


@pytest.mark.skipif(
    ROUNDS == 1, reason="`make chaos` has it; test_team.py has it without a cluster"
)
def test_a_role_that_hangs_is_replaced(
    long_config: Config,
    prepared: Prepared,
    mortal: Cluster,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score = TeacherPool.score
    stopped: list[int] = []

    def stop(teacher: TeacherPool, generated: Any) -> Any:
        if not stopped:
            stopped.append(pid_of(teacher._team.actors[0]))
            os.kill(stopped[0], signal.SIGSTOP)
        return score(teacher, generated)

    monkeypatch.setattr(TeacherPool, "score", stop)
    monkeypatch.setattr(
        mortal.faults, "_config", dataclasses.replace(long_config.faults, timeout_s=5.0)
    )
    config = dataclasses.replace(long_config, name="hang", num_steps=3)
    distill(config, prepared, mortal)
    assert stopped
    directory = Path(config.out) / config.name
    assert metrics_of(directory)[:3] == metrics_of(undisturbed)[:3]


def test_when_nothing_more_may_be_replaced_the_run_ends_with_a_checkpoint_and_goes_on_later(
    long_config: Config,
    prepared: Prepared,
    mortal: Cluster,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(long_config, name="limited")
    with monkeypatch.context() as patch:
        Killer(patch, {3: "score"})
        none = dataclasses.replace(long_config.faults, max_restarts=0)
        patch.setattr(mortal.faults, "_config", none)
        with pytest.raises(ListopdError) as raised:
            distill(config, prepared, mortal)
    # It may have died when its work for the third update was just done.
    kept = r"faults\.max_restarts=0; checkpoint after update [23]: the same command goes on"
    assert re.fullmatch(rf"teacher: number 0 died: [^\n]*; {kept}", str(raised.value))
    distill(config, prepared, mortal)  # whose teacher is dead: it is replaced now
    directory = Path(config.out) / config.name
    assert metrics_of(directory) == metrics_of(undisturbed)
    assert json.loads((directory / "summary.json").read_text())["num_steps"] == config.num_steps
