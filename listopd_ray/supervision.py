"""Actors may die or hang at any moment: calls that can be made again, budgets for new actors."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from tqdm import tqdm

from listopd_ray.config import FaultsConfig
from listopd_ray.types import ListopdError

START_TIMEOUT_S = 600.0
LOOK_S = 0.5  # between looks at what a wait is to end for
LONGEST_BACKOFF_S = 60.0
# The process is gone, with its node or alone; what a task raised itself is none of these.
GONE = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, GetTimeoutError)
LOST = (*GONE, ObjectLostError)


class ActorLost(ListopdError):  # noqa: N818 - what happened, not what went wrong
    """An actor died or hung, and nobody here can replace it."""


class LearnerLost(ActorLost):
    """It was the learner: what it had learnt since the newest checkpoint is lost too."""


class LimitReached(ListopdError):  # noqa: N818 - as above
    """A role was replaced, or samples were dropped, as often as the run allows."""


class Interrupted(ListopdError):  # noqa: N818 - as above
    """Somebody asked the run to end, by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum


class Faults:
    """How often each role was replaced, and may be; shared by all roles of a cluster."""

    def __init__(self, config: FaultsConfig) -> None:
        self._config = config
        self._restarts: Counter[str] = Counter()
        self._in_a_row = 0  # since the last update

    @property
    def timeout_s(self) -> float:
        return self._config.timeout_s

    def spend(self, role: str, why: str) -> None:
        """Say what happened and wait before the role is replaced; raises LimitReached."""
        limit = self._config.max_restarts
        if self._restarts[role] >= limit:
            times = f"replaced {limit} times (faults.max_restarts)"
            raise LimitReached(f"{role}: {why}; {times if limit else 'faults.max_restarts=0'}")
        self._restarts[role] += 1
        tqdm.write(f"{role}: {why}; replaced ({self._restarts[role]} of {limit})", file=sys.stderr)
        wait = min(self._config.backoff_s * 2**self._in_a_row, LONGEST_BACKOFF_S)
        self._in_a_row += 1
        pause(wait)

    def progress(self) -> dict[str, float]:
        """An update is done: the next wait is short again. Metrics of the roles replaced so far."""
        self._in_a_row = 0
        return {f"fault/{role}_restarts": float(n) for role, n in sorted(self._restarts.items())}


@dataclass
class Work:
    """A call of one of a team's actors, which can be made again."""

    index: int  # of the actor
    call: Callable[[Any, int], Any]  # (actor, attempt) → reference
    actor: Any
    reference: Any
    attempt: int = 0


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
        self._faults = faults
        self._spawn = spawn
        self.set_up: Callable[[Any], Any] | None = None  # a new actor's call before it serves

    def start(self, index: int, call: Callable[[Any, int], Any]) -> Work:
        actor = self.actors[index]
        return Work(index, call, actor, call(actor, 0))

    def results(self, works: Sequence[Work], *, poisons: bool = False) -> list[Any]:
        """Of all, in order; `poisons`: an actor whose call fails is not to be used again."""
        return [self._result(work, poisons) for work in works]

    def _result(self, work: Work, poisons: bool) -> Any:
        while True:
            try:
                return wait(work.reference, self._faults.timeout_s)
            except LOST as error:
                self._replace(work, why_lost(error))
            except RayError as error:
                if not poisons:
                    raise
                self._replace(work, f"failed: {_last_line(error)}")
            work.actor = self.actors[work.index]
            work.attempt += 1
            work.reference = work.call(work.actor, work.attempt)

    def _replace(self, work: Work, why: str) -> None:
        """Unless it has been, since the call was made."""
        if self.actors[work.index] is not work.actor:
            return
        who = f"{self.role} {work.index}"
        if self._spawn is None:
            raise ActorLost(f"{who}: {why}")
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
        self.actors[work.index] = actor


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


def pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_interrupt()
        time.sleep(min(LOOK_S, left))


_asked: int | None = None  # the signal that asked this process to end


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and the first SIGINT are kept for `check_interrupt`; a second SIGINT ends at once.

    Elsewhere than in the main thread, signals are left to whoever owns it.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def keep(signum: int, _: Any) -> None:
        global _asked
        if _asked is None:
            _asked = signum
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt

    before = {signum: signal.signal(signum, keep) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        left, _asked = _asked, None
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if left:  # it came too late for a checkpoint
        signal.raise_signal(left)


def check_interrupt() -> None:
    """Raises Interrupted once a signal has come; only once, so that a checkpoint can be written."""
    global _asked
    if _asked:
        signum, _asked = _asked, 0
        raise Interrupted(signum)


def why_lost(error: Exception) -> str:
    if isinstance(error, GetTimeoutError):
        return f"hung: {error}"
    return f"died: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    """What an error that came through Ray says in the end."""
    lines = str(getattr(error, "cause", error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
