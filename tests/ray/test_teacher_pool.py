"""Which teacher actor scores what, with actors that are made up: no cluster."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import make_rollout, make_scored
from ray.exceptions import ActorDiedError

from listopd_ray import supervision, team
from listopd_ray.config import FaultsConfig
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Scored
from listopd_ray.supervision import Faults
from listopd_ray.teacher_pool import TeacherPool, cuts
from listopd_ray.team import Team


class Call:
    """A reference; `done` is what `ray.wait` goes by."""

    def __init__(self, value):
        self.value, self.done = value, False


class Remote:
    def __init__(self, function):
        self.remote = function


class Actor:
    """Scores by its own name: the teacher's log-probabilities are its number."""

    def __init__(self, number, dies=False):
        self.number, self.dies, self.asked = number, dies, []
        self.__ray_ready__ = Remote(lambda: Call(None))
        self.score = Remote(self._score)

    def _score(self, part, base):
        self.asked.append([(r.prompt.id, r.sample_index) for r in part.rollouts])
        if self.dies:
            return Call(ActorDiedError())
        scored = tuple(make_scored(rollout, float(self.number)) for rollout in part.rollouts)
        return Call(Scored(rollouts=scored, seconds=float(len(scored))))


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    def wait(references, num_returns, timeout):
        done = [reference for reference in references if reference.done]
        return done, [reference for reference in references if not reference.done]

    def get(reference, timeout_s):
        reference.done = True
        if isinstance(reference.value, BaseException):
            raise reference.value
        return reference.value

    monkeypatch.setattr(team.ray, "wait", wait)
    monkeypatch.setattr(team, "wait", get)
    monkeypatch.setattr(team.ray, "kill", lambda actor: None)
    monkeypatch.setattr(supervision, "pause", lambda seconds: None)


def make_pool(actors, names=None, new=(), **faults):
    new = list(new)
    members = Team("teacher", actors, Faults(FaultsConfig(**faults)), lambda index: new.pop(0))
    return TeacherPool(members, names or [None] * len(actors))


def make_part(name, lengths, teachers=None):
    rollouts = []
    for index, length in enumerate(lengths):
        rollout = make_rollout(np.zeros(2, np.int32), [1] * (length - 2), prompt_id=name)
        prompt = replace(rollout.prompt, teacher=(teachers or {}).get(index))
        rollouts.append(replace(rollout, prompt=prompt, sample_index=index))
    return Generated(rollouts=tuple(rollouts), seconds=0.0)


def order(scored):
    return [(s.rollout.prompt.id, s.rollout.sample_index) for s in scored.rollouts]


def scorers(scored):
    return [int(s.teacher_logprobs[0]) for s in scored.rollouts]


def test_one_large_part_is_cut_so_that_every_replica_works():
    pool = make_pool([Actor(0), Actor(1)])
    (scored,) = pool.fetch(pool.score([make_part("p", [10, 10, 10, 10])]))
    assert order(scored) == [("p", index) for index in range(4)]
    assert scorers(scored) == [0, 0, 1, 1]


def test_parts_of_one_share_each_are_left_whole():
    actors = [Actor(0), Actor(1)]
    pool = make_pool(actors)
    works = pool.score([make_part("p", [10, 10]), make_part("q", [10, 9])])
    first, second = pool.fetch(works)
    assert (order(first), order(second)) == ([("p", 0), ("p", 1)], [("q", 0), ("q", 1)])
    assert [len(actor.asked) for actor in actors] == [1, 1]
    assert first.seconds == 2.0  # of its longest piece


def test_the_next_part_goes_where_the_fewest_tokens_are_left():
    pool = make_pool([Actor(0), Actor(1), Actor(2)])
    parts = [make_part(name, [length]) for name, length in zip("pqr", (30, 10, 20), strict=True)]
    works = [pool.score([part]) for part in parts]  # as they are sampled
    works.append(pool.score([make_part("s", [15])]))  # 30, 10, 20 under way
    works.append(pool.score([make_part("t", [5])]))  # 30, 25, 20
    done = pool.fetch([scoring for called in works for scoring in called])
    assert [scorers(part) for part in done] == [[0], [1], [2], [1], [2]]


def test_what_is_done_counts_no_longer_even_where_nobody_has_fetched_it():
    pool = make_pool([Actor(0), Actor(1)])
    pool.score([make_part("p", [10])])
    pool._busy[0][0].reference.done = True  # its result is lost with a learner, say
    ((work, _),) = pool.score([make_part("q", [10])])[0].pieces
    assert work.index == 0


def test_every_rollout_is_scored_by_the_teacher_that_its_prompt_names():
    pool = make_pool([Actor(0), Actor(1), Actor(2)], [None, "code", "code"])
    part = make_part("p", [10] * 5, {1: "code", 2: "code", 4: "code"})
    (scored,) = pool.fetch(pool.score([part]))
    assert order(scored) == [("p", index) for index in range(5)]
    assert scorers(scored) == [0, 1, 2, 0, 2]


def test_pieces_of_a_teacher_that_died_are_scored_again_and_come_back_in_order():
    new = Actor(7)
    pool = make_pool([Actor(0), Actor(1, dies=True)], new=[new], max_restarts=1)
    works = pool.score([make_part("p", [10] * 4), make_part("q", [10] * 4)])
    first, second = pool.fetch(works)
    assert [scorers(part) for part in (first, second)] == [[0] * 4, [7] * 4]
    assert order(second) == [("q", index) for index in range(4)]
    assert new.asked == [[("q", index) for index in range(4)]]


@pytest.mark.parametrize(
    ("lengths", "count", "bounds"),
    [
        ([10] * 4, 2, [0, 2, 4]),
        ([10] * 5, 2, [0, 2, 5]),
        ([10] * 4, 1, [0, 4]),
        ([10] * 4, 0, [0, 4]),
        ([5, 100], 2, [0, 1, 2]),
        ([100, 5], 2, [0, 1, 2]),
        ([10], 3, [0, 1]),
        ([40, 10, 10, 10, 10], 3, [0, 1, 2, 5]),
        ([100, 1, 1], 3, [0, 1, 3]),
    ],
)
def test_cuts_are_about_equal_and_leave_nothing_out(lengths, count, bounds):
    assert cuts(lengths, count) == bounds
