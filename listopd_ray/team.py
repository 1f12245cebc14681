"""The actors of one role, of which any may die or hang: calls that can be made again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from listopd_ray.supervision import (
    LOOK_S,
    ActorLost,
    Faults,
    LearnerLost,
    LimitReached,
    check_interrupt,
)
from listopd_ray.types import last_line

START_TIMEOUT_S = 600.0
# The process is gone, with its node or alone; what a task raised itself is none of these.
GONE = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, GetTimeoutError)
LOST = (*GONE, ObjectLostError)


@dataclass
class Work:
    """A call of one of a team's actors, which can be made again."""

    index: int  # of the actor
    call: Callable[[Any, int], Any]  # (actor, attempt) → reference
    actor: Any
    reference: Any
    attempt: int = 0
    waited_s: float = 0.0  # for this attempt, before `results` was asked


class Team:
    """The actors of one role. One that dies or hangs is replaced, and its calls are made again."""

    def __init__(
        self,
        role: str,
        actors: Sequence[Any],
        faults: Faults,
        spawn: Callable[[int], Any] | None,
    ) -> None:
        """`spawn` starts a new actor in the place of number `index`; None: a loss is final, as
        where several runs share the actors."""
        self.role = role
        self.actors = list(actors)
        self._members = list(enumerate(actors))  # the ones before too
        self._faults = faults
        self._spawn = spawn
        self.set_up: Callable[[Any], Any] | None = None  # a new actor's call before it serves

    def members(self) -> list[tuple[str, Any]]:
        """Every actor that it has or had, after the name of its place: "rollout 0"."""
        return [(f"{self.role} {index}", actor) for index, actor in self._members]

    def start(self, index: int, call: Callable[[Any, int], Any]) -> Work:
        actor = self.actors[index]
        return Work(index, call, actor, call(actor, 0))

    def ready(self, works: Sequence[Work], *, block: bool) -> list[int]:
        """Positions of those whose call has ended, however it did; with `block` at least one: the
        first to end, or where none does in time, one for `results` to deal with."""
        start = time.monotonic()
        references = {work.reference: number for number, work in enumerate(works)}
        while True:
            done, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
            if not done and block:
                check_interrupt()
                left = min(self._faults.timeout_s - work.waited_s for work in works)
                done, _ = ray.wait(list(references), timeout=max(0.0, min(LOOK_S, left)))
                for work in works:
                    work.waited_s += time.monotonic() - start
                start = time.monotonic()
                done = done or ([works[0].reference] if left <= 0 else [])
            if done or not block:
                return sorted(references[reference] for reference in done)

    def results(self, works: Sequence[Work], *, poisons: bool = False) -> list[Any]:
        """Of all, in order; `poisons`: an actor whose call fails is not to be used again."""
        return [self._result(work, poisons) for work in works]

    def _result(self, work: Work, poisons: bool) -> Any:
        while True:
            try:
                return wait(work.reference, self._faults.timeout_s - work.waited_s)
            except LOST as error:
                self._replace(work, why_lost(error))
            except RayError as error:
                if not poisons:
                    raise
                self._replace(work, f"failed: {last_line(error)}")
            work.actor = self.actors[work.index]
            work.attempt, work.waited_s = work.attempt + 1, 0.0
            work.reference = work.call(work.actor, work.attempt)

    def _replace(self, work: Work, why: str) -> None:
        """Unless it has been, since the call was made."""
        if self.actors[work.index] is not work.actor:
            return
        who = f"{self.role} {work.index}:"
        if self._spawn is None:
            raise ActorLost(f"{who} {why}")
        ray.kill(work.actor)
        while True:
            self._faults.spend(self.role, f"number {work.index} {why}")
            actor = self._spawn(work.index)
            try:
                wait(actor.__ray_ready__.remote(), START_TIMEOUT_S)
                if self.set_up is not None:
                    wait(self.set_up(actor), self._faults.timeout_s)
                break
            except GONE as error:
                ray.kill(actor)
                why = why_lost(error)
            except ObjectLostError as error:  # the weights
                ray.kill(actor)
                raise LearnerLost("learner lost its machine") from error
            except RayError as error:
                ray.kill(actor)
                raise LimitReached(f"{who} {why}; a new one too: {last_line(error)}") from error
            except BaseException:  # the run is interrupted
                ray.kill(actor)
                raise
        self.actors[work.index] = actor
        self._members.append((work.index, actor))


def wait(reference: Any, timeout_s: float) -> Any:
    """`ray.get` that an interrupt ends; raises Interrupted then, GetTimeoutError after the time."""
    end = time.monotonic() + timeout_s
    while True:
        check_interrupt()
        left = end - time.monotonic()
        ready, _ = ray.wait([reference], timeout=max(0.0, min(LOOK_S, left)))
        if ready:
            return ray.get(reference)
        if left <= 0:
            raise GetTimeoutError(f"no answer in {timeout_s:g} s")


def why_lost(error: Exception) -> str:
    if isinstance(error, GetTimeoutError):
        return f"hung: {error}"
    if "running low on memory" in str(error):  # Ray's memory monitor has ended it
        return "died: its machine was out of memory"
    return f"died: {last_line(error).split('. ')[0]}"  # Ray goes on with what may be the cause
