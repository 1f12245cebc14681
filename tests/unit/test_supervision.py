import os
import signal
import threading

import pytest

from listopd_ray import supervision
from listopd_ray.config import FaultsConfig
from listopd_ray.supervision import (
    Faults,
    Interrupted,
    LimitReached,
    check_interrupt,
    handlers_kept,
    interruptible,
)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were to be waited, without waiting."""
    seconds = []
    monkeypatch.setattr(supervision, "pause", seconds.append)
    return seconds


def test_the_wait_doubles_until_an_update_is_done_and_has_an_end(waits):
    faults = Faults(FaultsConfig(max_restarts=100, backoff_s=2.0))
    for _ in range(3):
        faults.spend("rollout", "died")
    faults.spend("teacher", "died")
    assert waits == [2.0, 4.0, 8.0, 16.0]
    faults.progress()
    for _ in range(8):
        faults.spend("rollout", "died")
    assert waits[4:] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_each_role_has_its_own_budget_and_says_when_it_is_used_up(waits, capsys):
    faults = Faults(FaultsConfig(max_restarts=2))
    for role in ("rollout", "rollout", "teacher", "teacher"):
        faults.spend(role, "number 0 died: killed")
    faults.progress()  # an update does not bring it back
    with pytest.raises(LimitReached) as raised:
        faults.spend("rollout", "number 0 died: killed")
    assert str(raised.value) == (
        "rollout: number 0 died: killed; replaced 2 times (faults.max_restarts)"
    )
    assert len(waits) == 4
    said = capsys.readouterr().err.split("\n")
    assert "rollout: number 0 died: killed; replaced (2 of 2)" in said[1]
    assert faults.progress() == {"fault/rollout_restarts": 2.0, "fault/teacher_restarts": 2.0}


def test_with_no_budget_nothing_is_replaced(waits):
    with pytest.raises(LimitReached, match=r"teacher: died; faults\.max_restarts=0"):
        Faults(FaultsConfig(max_restarts=0)).spend("teacher", "died")
    assert waits == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_kept_until_it_is_looked_for_and_seen_once(signum):
    with interruptible():
        check_interrupt()
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted) as raised:
            check_interrupt()
        assert raised.value.signum == signum
        check_interrupt()  # a checkpoint may be written now
        os.kill(os.getpid(), signal.SIGTERM)  # impatience
        check_interrupt()


def test_ctrl_c_a_second_time_ends_at_once():
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_came_too_late_goes_to_whoever_waits_for_it_outside():
    before, seen = signal.getsignal(signal.SIGTERM), []
    handler = lambda signum, _: seen.append(signum)  # noqa: E731
    signal.signal(signal.SIGTERM, handler)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_that_are_set_survive_whoever_leaves_others_behind():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with handlers_kept():
            for signum in before:
                signal.signal(signum, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # there was none to keep
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize(("code", "signum"), [(15, signal.SIGTERM), (0, signal.SIGINT)])
def test_handlers_that_end_the_process_silently_do_not(code, signum):
    with pytest.raises(Interrupted) as raised, handlers_kept():
        raise SystemExit(code)  # as Ray's and Ray Train's do
    assert raised.value.signum == signum


def test_signals_are_left_alone_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
