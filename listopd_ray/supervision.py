"""What may happen to a run, and how much of it the run lives through: faults and signals."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from listopd_ray.config import FaultsConfig
from listopd_ray.types import ListopdError

LOOK_S = 0.5  # between looks at what a wait is to end for
LONGEST_BACKOFF_S = 60.0


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
        self.signum = signum


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


def pause(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check_interrupt()
        time.sleep(min(LOOK_S, left))


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Where the block (Ray's functions do) leaves its own handlers behind, those before come back.

    Raises Interrupted where they end the process meanwhile, as they do, silently. Elsewhere than in
    the main thread nothing can be set, here and there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit as error:
        sigterm = error.code == signal.SIGTERM
        raise Interrupted(signal.SIGTERM if sigterm else signal.SIGINT) from None
    finally:
        for signum, handler in before.items():
            if handler not in (signal.SIG_DFL, None):
                signal.signal(signum, handler)


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


def hold_interrupts() -> None:
    """The run ends already: it is not to be interrupted while it writes its checkpoint."""
    global _asked
    _asked = 0


def check_interrupt() -> None:
    """Raises Interrupted once a signal has come; only once, so that a checkpoint can be written."""
    global _asked
    if _asked:
        signum, _asked = _asked, 0
        raise Interrupted(signum)
