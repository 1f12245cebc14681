"""Slots: engines that live on from one trial to the next, on one machine or many.

A slot is a placement group with rollout engines and room for one learner; the teachers are shared
by all slots. A trial is a whole run: it leases a slot, gets a learner of its own in it and gives
the slot back. As many trials run at once as there are slots, so a small cluster never deadlocks.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util import ActorPool

from listopd_ray.cluster import Cluster, SharedTeachers
from listopd_ray.config import Config, needs_base
from listopd_ray.handles import LearnerHandle, Workers
from listopd_ray.placement import beside_driver, bundles_of, check_room, teacher_bundles
from listopd_ray.prepare import Prepared, prepare
from listopd_ray.supervision import Faults
from listopd_ray.teacher_pool import TeacherPool
from listopd_ray.tracking import progress_bar
from listopd_ray.types import ListopdError, last_line


@dataclass(frozen=True)
class Lease:
    """A trial's slot, in the place of a `Cluster`."""

    workers: Workers
    teacher: TeacherPool
    faults: Faults
    keeper: Any
    index: int

    def start_learner(
        self, config: Config, student_path: Path, canary_ids: np.ndarray
    ) -> LearnerHandle:
        """A fresh learner in place of the one before."""
        arguments = (self.index, config, student_path, canary_ids)
        return ray.get(self.keeper.start_learner.remote(*arguments))


class Slots:
    """The slots as one. Use as a context manager within a Ray session."""

    def __init__(self, config: Config, num_slots: int) -> None:
        """`config` says how large a slot is; raises ListopdError where they do not all fit."""
        bundles = bundles_of(config, with_teachers=False) * num_slots + teacher_bundles(config)
        check_room(config, f"{num_slots} slots", bundles)
        # Leases may wait while others are given back.
        self.keeper = (
            ray.remote(SlotKeeper)
            .options(
                num_cpus=0,
                max_concurrency=2 * num_slots + 2,
                scheduling_strategy=beside_driver(),
            )
            .remote(num_slots)
        )
        self._num_slots = num_slots

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ray.exceptions.RayError):  # it may be dead, or busy with a start
            ray.get(self.keeper.shutdown.remote(), timeout=10)
        ray.kill(self.keeper)

    def run(self, configs: Sequence[Config]) -> Iterator[tuple[Config, dict[str, Any]]]:
        """Trials as they finish, with their summaries; {"error": …} for one that failed."""
        pool = ActorPool(self._runners)
        for number in range(len(configs)):
            pool.submit(lambda actor, n: actor.run.remote(n, configs[n]), number)
        while pool.has_next():
            number, summary = pool.get_next_unordered()
            yield configs[number], summary

    def measure(self, configs: Sequence[Config]) -> list[Any]:
        """A `calibrate.Measured` for each."""
        measured = []
        with progress_bar("calibrate", len(configs), unit="seed") as bar:
            for one in ActorPool(self._runners).map(lambda a, c: a.measure.remote(c), configs):
                measured.append(one)
                bar.update()
        return measured

    @cached_property
    def _runners(self) -> list[Any]:
        """As many as slots; they keep a seed's inputs from call to call."""
        runner = ray.remote(Runner).options(num_cpus=0, scheduling_strategy=beside_driver())
        return [runner.remote(self.keeper) for _ in range(self._num_slots)]


class SlotKeeper:
    """The actor that owns engines and teachers. A slot is made when it is first leased, and anew
    where its engines have died, its last trial failed, or they do not fit the next one."""

    def __init__(self, num_slots: int) -> None:
        self._slots: list[_Slot] = [_Slot() for _ in range(num_slots)]
        self._teachers: SharedTeachers | None = None
        self._teachers_for: Any = None
        self._teacher_in_use: Any = None  # or was last
        self._changed = threading.Condition()  # who holds which slot
        self._ended: set[str] = set()  # holders that gave back, perhaps before they had anything
        self._teacher_lock = threading.Lock()
        self._seconds: dict[str, list[float]] = {"built": [], "reused": []}

    def lease(self, config: Config, arguments: dict[str, Any], holder: str) -> Lease:
        """Wait for a slot, and for trials that use another teacher; `arguments` as for `Cluster`,
        `holder`: a name for this trial alone."""
        start = time.perf_counter()
        arguments = dict(arguments)
        teachers = (arguments.pop("teacher_path"), arguments.pop("teachers"))
        lengths = (arguments["max_prompt_tokens"], arguments["max_new_tokens"])
        engine = (lengths, config.sync) if config.scoring.backend == "vllm" else None
        teacher = (teachers, config.scoring, config.learner.dtype, config.device, engine)
        fixed = {name: value for name, value in arguments.items() if name != "student_path"}
        learner = (bundles_of(config)[0], config.learner.num_ranks, config.learner.dtype)
        wanted = (fixed, config.rollout, learner, config.sync, config.lora, config.device)
        run = (config.out, config.name, config.seed)  # never twice at once
        with self._changed:
            self._changed.wait_for(lambda: self._is_turn_of(run, teacher))
            self._check_alive(holder)
            free = self._free()
            slot = next((s for s in free if s.built_for == wanted), free[0])
            slot.holder, slot.run, slot.is_building = holder, run, True
            self._teacher_in_use = teacher
        sound = False
        try:
            pool = self._shared_teachers(config, (*teachers, lengths), teacher)
            if is_new := not slot.fits(wanted):
                slot.drop()
                slot.cluster = Cluster(config, teacher_path=None, supervised=False, **arguments)
                slot.cluster.wait_until_ready()
                slot.built_for = wanted
            sound = True
            with self._changed:
                slot.is_building = False
                self._check_alive(holder)
        except BaseException:
            with self._changed:
                self._give_back(slot, sound=sound)
            raise
        self._seconds["built" if is_new else "reused"].append(time.perf_counter() - start)
        keeper = ray.get_runtime_context().current_actor
        cluster = slot.cluster
        assert cluster is not None
        return Lease(cluster.workers, pool, cluster.faults, keeper, self._slots.index(slot))

    def start_learner(self, index: int, *arguments: Any) -> LearnerHandle:
        cluster = self._slots[index].cluster
        assert cluster is not None  # it is leased
        return cluster.start_learner(*arguments)

    def release(self, holder: str, *, sound: bool) -> None:
        """Give back what `holder` has, if anything; `sound`: its engines may serve another."""
        with self._changed:
            self._ended.add(holder)
            for slot in self._slots:
                if slot.holder == holder and not slot.is_building:  # else `lease` does it
                    self._give_back(slot, sound=sound)

    def shutdown(self) -> None:
        """End all engines and teachers."""
        for slot in self._slots:
            slot.drop()
        if self._teachers is not None:
            self._teachers.shutdown()

    def seconds(self) -> dict[str, list[float]]:
        """How long every lease took that had to start engines, and every one that had not."""
        return self._seconds

    def _free(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.holder is None]

    def _is_turn_of(self, run: Any, teacher: Any) -> bool:
        taken = [slot for slot in self._slots if slot.holder is not None]
        fits = not taken or self._teacher_in_use == teacher
        return len(taken) < len(self._slots) and fits and all(slot.run != run for slot in taken)

    def _check_alive(self, holder: str) -> None:
        if holder in self._ended:
            raise ListopdError(f"{holder}: has ended")

    def _give_back(self, slot: _Slot, *, sound: bool) -> None:
        if not sound:
            slot.drop()
        elif slot.cluster is not None:
            slot.cluster.stop_learner()
        slot.holder, slot.run, slot.is_building = None, None, False
        self._changed.notify_all()

    def _shared_teachers(
        self, config: Config, arguments: tuple[Any, ...], wanted: Any
    ) -> TeacherPool:
        """One set for all slots; made anew for other teachers, and where one of them has died.
        `arguments` as for `SharedTeachers`."""
        with self._teacher_lock:
            if self._teachers is None or self._teachers_for != wanted or not _alive(self._teachers):
                if self._teachers is not None:
                    self._teachers.shutdown()
                self._teachers = SharedTeachers(config, len(self._slots), *arguments)
                self._teachers.wait_until_ready()
                self._teachers_for = wanted
            return self._teachers.pool


class _Slot:
    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.built_for: Any = None
        self.holder: str | None = None
        self.run: Any = None  # the holder's
        self.is_building = False

    def fits(self, wanted: Any) -> bool:
        return self.cluster is not None and self.built_for == wanted and _alive(self.cluster)

    def drop(self) -> None:
        if self.cluster is not None:
            self.cluster.shutdown()
            self.cluster = self.built_for = None


def _alive(actors: Cluster | SharedTeachers) -> bool:
    try:
        actors.wait_until_ready()
    except ListopdError:
        return False
    return True


class Runner:
    """Runs trials in leased slots, one after the other."""

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def run(self, number: int, config: Config) -> tuple[int, dict[str, Any]]:
        """Distil; `number` comes back with the summary, or with the error that ended the trial."""
        from listopd_ray.job import distill  # which imports much that the driver does without

        try:
            return number, self._in_slot(distill, config)
        except (ListopdError, ray.exceptions.RayError) as error:
            return number, {"error": last_line(error)}

    def measure(self, config: Config) -> Any:
        from listopd_ray.calibrate import measure_run

        return self._in_slot(measure_run, config)

    def _in_slot(self, work: Any, config: Config) -> Any:
        prepared = prepared_for(config)
        holder, sound = uuid.uuid4().hex, False
        lease = ray.get(self._keeper.lease.remote(config, prepared.cluster_arguments(), holder))
        try:
            result = work(config, prepared, lease)
            sound = True
            return result
        finally:
            ray.get(self._keeper.release.remote(holder, sound=sound))


_last: tuple[str, Prepared] | None = None


def prepared_for(config: Config) -> Prepared:
    """`prepare`, kept for this process's next trial of the same seed, data and models."""
    global _last
    inputs = (config.seed, config.data, config.task, config.tokenizer, needs_base(config))
    models = (config.student, config.teacher, config.teachers, config.base)
    key = repr((inputs, models, config.rollout.max_new_tokens))
    if _last is None or _last[0] != key:
        _last = (key, prepare(config))
    return _last[1]
