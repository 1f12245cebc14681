"""Replacing actors, with actors that are made up: no cluster."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
)

from listopd_ray import cluster, supervision, team
from listopd_ray.config import FaultsConfig
from listopd_ray.supervision import ActorLost, Faults, Interrupted, LearnerLost, LimitReached
from listopd_ray.team import Team, Work, why_lost
from listopd_ray.types import ListopdError


class Remote:
    """A method of a made-up actor; its references are functions that give the result or raise."""

    def __init__(self, function: Any) -> None:
        self.remote = function


class Actor:
    def __init__(self, name: str, results: list[Any], ready: Any = None, load: Any = None) -> None:
        self.name, self.results = name, results
        self.__ray_ready__ = Remote(lambda: ready)
        self.work = Remote(lambda *arguments: self.results.pop(0))
        self.load = Remote(lambda: load)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the actors that were killed. A reference is its own value, errors are raised."""
    names: list[str] = []

    def get(reference: Any, timeout_s: float) -> Any:
        if isinstance(reference, BaseException):
            raise reference
        return reference

    monkeypatch.setattr(team.ray, "kill", lambda actor: names.append(actor.name))
    monkeypatch.setattr(team, "wait", get)
    monkeypatch.setattr(supervision, "pause", lambda seconds: None)
    return names


def make_team(actor: Actor, new: list[Actor] | None, **faults: Any) -> Team:
    spawn = None if new is None else (lambda index: new.pop(0))
    return Team("rollout", [actor], Faults(FaultsConfig(**faults)), spawn)


def start(members: Team) -> Work:
    return members.start(0, lambda actor, attempt: actor.work.remote(attempt))


DIED = ActorDiedError()


@pytest.mark.parametrize(
    "error", [DIED, GetTimeoutError("no answer"), ObjectLostError("", None, "")]
)
def test_what_a_lost_actor_was_to_do_its_successor_does(
    error: Exception, killed: list[str]
) -> None:
    old, new = Actor("old", [error, DIED]), Actor("new", ["a", "b"])
    members = make_team(old, [new])
    works = [start(members), start(members)]
    assert members.results(works) == ["a", "b"]
    assert killed == ["old"]  # once, for both
    assert [work.attempt for work in works] == [1, 1]
    assert members.actors == [new]


def test_a_new_actor_is_set_up_before_it_serves(killed: list[str]) -> None:
    done: list[str] = []
    members = make_team(Actor("old", [DIED]), [Actor("new", ["a"])])
    members.set_up = lambda actor: done.append(actor.name)
    assert members.results([start(members)]) == ["a"]
    assert done == ["new"]


def test_one_that_dies_before_it_serves_is_replaced_too(killed: list[str]) -> None:
    new = [Actor("first", [], ready=DIED), Actor("second", ["a"])]
    members = make_team(Actor("old", [DIED]), new)
    assert members.results([start(members)]) == ["a"]
    assert killed == ["old", "first"]


def test_the_budget_ends_that(killed: list[str]) -> None:
    new = [Actor(f"{n}", [], ready=DIED) for n in range(9)]
    members = make_team(Actor("old", [DIED]), new, max_restarts=3)
    with pytest.raises(LimitReached, match=r"replaced 3 times \(faults\.max_restarts\)"):
        members.results([start(members)])
    assert killed == ["old", "0", "1", "2"]


def test_an_error_of_the_work_itself_is_raised_and_nothing_replaced(killed: list[str]) -> None:
    failure = RayTaskError("work", "trace", ValueError("bad"))
    members = make_team(Actor("old", [failure]), [])
    with pytest.raises(RayTaskError):
        members.results([start(members)])
    assert killed == []


def test_unless_it_poisons_the_actor(killed: list[str]) -> None:
    failure = RayTaskError("work", "trace", ValueError("bad"))
    members = make_team(Actor("old", [failure]), [Actor("new", ["a"])])
    assert members.results([start(members)], poisons=True) == ["a"]
    assert killed == ["old"]


def test_where_a_new_actor_fails_alike_the_run_ends_with_its_words(killed: list[str]) -> None:
    failure = RayTaskError("load", "trace", ValueError("canary differs"))
    members = make_team(Actor("old", [failure]), [Actor("new", [])])
    members.set_up = lambda actor: failure
    with pytest.raises(LimitReached, match=r"a new one too: .*canary differs"):
        members.results([start(members)], poisons=True)
    assert killed == ["old", "new"]


def test_weights_that_are_gone_are_the_learners_loss(killed: list[str]) -> None:
    members = make_team(Actor("old", [DIED]), [Actor("new", [])])
    members.set_up = lambda actor: ObjectLostError("", None, "")
    with pytest.raises(LearnerLost):
        members.results([start(members)])
    assert killed == ["old", "new"]  # its place is free


def test_an_interrupt_while_an_actor_starts_leaves_none_behind(killed: list[str]) -> None:
    members = make_team(Actor("old", [DIED]), [Actor("new", [], ready=Interrupted(15))])
    with pytest.raises(Interrupted):
        members.results([start(members)])
    assert killed == ["old", "new"]


def test_actors_that_are_shared_are_not_replaced(killed: list[str]) -> None:
    members = make_team(Actor("old", [DIED]), None)
    with pytest.raises(ActorLost, match="rollout 0: died"):
        members.results([start(members)])
    assert killed == []


def test_a_worker_that_ran_out_of_memory_is_told_from_others() -> None:
    # As Ray's memory monitor says it (2.60), before a page of figures.
    text = "1 worker(s) were killed due to the node running low on memory. Memory on the node was"
    assert why_lost(OutOfMemoryError(text)) == "died: its machine was out of memory"
    assert why_lost(GetTimeoutError("no answer in 5 s")) == "hung: no answer in 5 s"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n"),
        ConnectionError("Could not find any running Ray instance.\nPlease specify"),
        OSError("[Errno 98] Address already in use"),
    ],
)
def test_a_cluster_that_cannot_be_joined_or_started_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(ListopdError) as raised, cluster.ray_session():
        pass
    assert str(raised.value) == f"Ray did not start: {' '.join(str(error).split())}"
