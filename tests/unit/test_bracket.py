"""The search on simulated trials: seeds whose parsing collapses at λ of their own, counted on
prompts, two or more at a time, ending in any order."""

from __future__ import annotations

import dataclasses
import heapq
import json
import zlib
from dataclasses import dataclass

import numpy as np
import pytest

from listopd_ray.search.bracket import Bracket
from listopd_ray.search.judgement import Outcome, rate

BUDGET, STOPPED_AT = 120, 30


@dataclass
class World:
    """Strict parse of five seeds falls at λ that scatter by 0.12, about as measured at c = 2.

    Counts are a function of λ and seed, as real trials are.
    """

    rng_seed: int
    onset: float = 1.33
    num_seeds: int = 5
    num_prompts: int = 512
    recovers: tuple[float, ...] = ()  # λ at which outputs collapse and come back

    def __post_init__(self):
        rng = np.random.default_rng(self.rng_seed)
        self.onsets = np.maximum(1.04, rng.normal(self.onset, 0.12, self.num_seeds))
        self.tops = rng.uniform(0.78, 0.83, self.num_seeds)

    def parse(self, lam, seed):
        return self.tops[seed] / (1 + np.exp((lam - self.onsets[seed]) / 0.03))

    def mean(self, lam):
        return np.mean([self.parse(lam, seed) for seed in range(self.num_seeds)])

    @property
    def true_onset(self):
        low, high = 1.0, 9.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.mean(middle) >= self.mean(1.0) / 2 else (low, middle)
        return low

    def run(self, job):
        key = f"{self.rng_seed} {job.lam} {job.seed}".encode()
        rng = np.random.default_rng(zlib.crc32(key))
        parse = self.parse(job.lam, job.seed)
        if not job.full and (parse < 0.05 or job.lam in self.recovers):
            parsed = rng.binomial(192, min(parse, 0.04))
            return Outcome(job.lam, job.seed, "collapsed", parsed, 192, STOPPED_AT, STOPPED_AT)
        parsed = rng.binomial(self.num_prompts, parse)
        options = dict(sampled=self.num_prompts, step=BUDGET, updates=BUDGET)
        return Outcome(job.lam, job.seed, "finished", parsed, **options)


def make_bracket(world, start, *, resolution=0.05, slots=2, state=None, **options):
    settings = dict(max_lam=6.0, error=0.01, margin=0.2, attempts=3) | options
    return Bracket(
        start=start,
        seeds=range(world.num_seeds),
        resolution=resolution,
        slots=slots,
        state=state,
        **settings,
    )


def simulate(world, bracket, *, slots=2, order=0, stop_after=None):
    """Run trials until the bracket asks for none; the jobs that ended, in order."""
    rng = np.random.default_rng(order)
    running, ended, clock = [], [], 0.0
    while True:
        while len(running) < slots and (job := bracket.next_job()):
            outcome = world.run(job)
            takes = outcome.updates * rng.uniform(0.8, 1.25)
            heapq.heappush(running, (clock + takes, rng.random(), job, outcome))
        if not running:  # it never waits for itself
            assert bracket.done or bracket.given_up
            return ended
        if len(ended) == stop_after:
            return ended
        clock, _, job, outcome = heapq.heappop(running)
        bracket.record(outcome)
        ended.append(job)


def near(value, by=0.005):
    return (value - by, value + by)


def test_the_onset_lies_in_the_bracket_however_wrong_the_prediction_within_half():
    inside = narrow = 0
    offs = np.random.default_rng(0).uniform(-0.5, 0.5, 500)
    for number, off in enumerate(offs):
        world = World(number)
        bracket = make_bracket(world, near(max(1.0, world.true_onset + off)))
        simulate(world, bracket)
        inside += bracket.low < world.true_onset <= bracket.high
        narrow += bracket.high - bracket.low < 0.0501
        assert bracket.confidence > 0.97
    assert inside >= 0.98 * len(offs)
    assert narrow >= 0.95 * len(offs)  # in the others even half-way points are too close to call


def test_the_number_of_trials_grows_with_the_logarithm_of_the_resolution():
    def mean_trials(resolution):
        worlds = [World(number, num_prompts=100_000) for number in range(60)]
        brackets = [make_bracket(w, near(1.6), resolution=resolution) for w in worlds]
        return np.mean([len(simulate(w, b)) for w, b in zip(worlds, brackets, strict=True)])

    coarse, fine, finest = (mean_trials(resolution) for resolution in (0.2, 0.05, 0.0125))
    # A resolution four times as fine adds the same again; a grid's would add four times as much.
    assert 0.7 < (finest - fine) / (fine - coarse) < 1.4
    assert finest - fine < 4 * 5


def test_a_prediction_that_is_doubled_costs_a_few_trials_and_changes_nothing():
    for number in range(20):
        world = World(number)
        right, wrong = (make_bracket(world, near(world.true_onset * factor)) for factor in (1, 2))
        trials = [len(simulate(world, bracket)) for bracket in (right, wrong)]
        assert (wrong.low, wrong.high) == (right.low, right.high)
        assert trials[1] - trials[0] <= 6 * 5  # of six λ at most: on the way down, and between


def test_trials_may_end_in_any_order():
    world = World(3)
    brackets = [make_bracket(world, near(1.7)) for _ in range(5)]
    for order, bracket in enumerate(brackets):
        simulate(world, bracket, order=order)
    assert len({tuple(bracket.asked) for bracket in brackets}) == 1
    assert len({(b.low, b.high, b.confidence) for b in brackets}) == 1


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_a_search_that_is_killed_and_restored_ends_as_if_it_had_not_been(slots):
    rng = np.random.default_rng(slots)
    for number in range(20):
        world = World(number)
        whole = make_bracket(world, near(1.7), slots=slots)
        jobs = simulate(world, whole, slots=slots)
        killed = make_bracket(world, near(1.7), slots=slots)
        before = simulate(world, killed, slots=slots, stop_after=rng.integers(len(jobs)))
        state = json.loads(json.dumps(killed.state()))  # what runs at that moment is lost
        restored = make_bracket(world, near(1.7), slots=slots, state=state)
        after = simulate(world, restored, slots=slots, order=1)
        assert restored.asked == whole.asked
        assert (restored.low, restored.high) == (whole.low, whole.high)
        assert restored.confidence == whole.confidence
        ended = [(job.lam, job.seed, job.full) for job in before + after]
        assert len(set(ended)) == len(ended)  # nothing is evaluated twice


def test_a_collapse_that_recovers_does_not_end_the_bracket():
    world = World(1)
    right = make_bracket(world, near(world.true_onset))
    simulate(world, right)
    deceived = World(1, recovers=(right.low,))
    bracket = make_bracket(deceived, near(deceived.true_onset))
    simulate(deceived, bracket)
    assert (bracket.low, bracket.high) == (right.low, right.high)
    for lam in (bracket.low, bracket.high):
        assert bracket.verdict(lam).full


def test_both_ends_are_judged_at_the_full_budget():
    world = World(2)
    bracket = make_bracket(world, near(2.5))
    simulate(world, bracket)
    for lam, unknown, holds in ((bracket.low, 0, True), (bracket.high, 1, False)):
        outcomes = [bracket.outcomes.get((lam, seed)) for seed in range(5)]
        rates = [rate(o) if o and o.kind == "finished" else unknown for o in outcomes]
        assert (np.mean(rates) >= bracket.floor) == holds
        assert bracket.verdict(lam).full
    assert any(o.kind == "collapsed" for o in bracket.outcomes.values())  # elsewhere they do stop


def test_more_slots_than_seeds_need_search_several_lams_at_once():
    world = World(4)
    one, three = (make_bracket(world, near(2.5), slots=slots) for slots in (1, 9))
    simulate(world, one)
    simulate(world, three, slots=9)
    assert (three.low, three.high) == (one.low, one.high)
    with_floor = [three.asked[:3], three.asked[3:6]]
    assert all(len(lams) == len(set(lams)) for lams in with_floor)
    assert len(three.asked) > len(one.asked)


def test_a_failed_trial_is_asked_for_again_and_is_no_verdict():
    world = World(5)
    bracket, right = (make_bracket(world, near(1.3)) for _ in range(2))
    failed = set()
    running = []
    while not bracket.done:
        while len(running) < 2 and (job := bracket.next_job()):
            running.append(job)
        job = running.pop(0)
        if (job.lam, job.seed) in failed or job.seed % 2:
            bracket.record(world.run(job))
        else:
            failed.add((job.lam, job.seed))
            bracket.fail(job.lam, job.seed)
    simulate(world, right)
    assert failed
    assert (bracket.low, bracket.high, bracket.asked) == (right.low, right.high, right.asked)


def test_a_trial_that_keeps_failing_ends_the_search_without_a_bracket():
    bracket = make_bracket(World(0), near(1.3), attempts=2)
    for _ in range(2):
        job = bracket.next_job()
        bracket.fail(job.lam, job.seed)
    assert bracket.given_up
    assert bracket.next_job() is None
    assert not bracket.done


def test_nothing_breaks_up_to_the_largest_lam():
    world = World(6, onset=9.0)
    bracket = make_bracket(world, near(1.3), max_lam=2.0)
    simulate(world, bracket)
    assert (bracket.low, bracket.high) == (2.0, None)
    assert bracket.recommended == 1.8


def test_an_onset_just_above_one_is_bracketed_by_it():
    world = World(7, onset=1.0)
    world.onsets[:] = 1.02
    bracket = make_bracket(world, near(1.9), resolution=0.1)
    simulate(world, bracket)
    assert (bracket.low, bracket.high) == (1.0, 1.1)
    assert bracket.recommended == 1.0


@pytest.mark.parametrize("onsets", [(1.2, 1.2, 1.7, 1.7), (1.2, 1.25, 1.7, 1.75), (1.3, 9.0)])
def test_a_plateau_at_the_floor_is_crossed_in_growing_steps_and_left_out(onsets):
    """Half of the seeds hold and half break, on the way from one onset to the other."""
    world = World(0, num_seeds=len(onsets))
    world.onsets, world.tops = np.array(onsets), np.full(len(onsets), 0.8)
    bracket = make_bracket(world, near(1.5))
    trials = len(simulate(world, bracket))
    assert trials < 80  # half a step at a time it would be up to 454


@pytest.mark.parametrize(("top", "num_prompts"), [(0.0, 512), (0.004, 512), (0.8, 2)])
def test_a_floor_from_which_nothing_can_be_told_ends_the_search_at_once(top, num_prompts):
    world = World(0, num_prompts=num_prompts)
    world.tops[:] = top
    bracket = make_bracket(world, near(1.3))
    jobs = [bracket.next_job() for _ in range(5)]
    for job in jobs:
        bracket.record(world.run(job))
    assert bracket.blind
    assert bracket.next_job() is None


def test_the_student_has_the_seed_that_parses_best_at_the_lower_end():
    for number in range(20):
        world = World(number)
        bracket = make_bracket(world, near(1.3))
        jobs = simulate(world, bracket)
        assert jobs[-1].lam == bracket.recommended
        student = bracket.outcomes[bracket.recommended, bracket.student_seed]
        assert rate(student) > bracket.floor


def test_updates_of_failed_and_of_forgotten_attempts_count():
    world = World(0)
    bracket = make_bracket(world, near(1.3))
    job = bracket.next_job()
    bracket.fail(job.lam, job.seed, updates=7)
    restored = make_bracket(world, near(1.3), state=bracket.state())
    job = restored.next_job()
    outcome = world.run(job)
    # Finished under a driver that was killed: no report reached this one.
    restored.record(dataclasses.replace(outcome, updates=0))
    assert restored.updates == BUDGET  # the 7 are among them


def test_what_a_failed_attempt_spent_counts_once():
    world = World(0)
    bracket = make_bracket(world, near(1.3))
    job = bracket.next_job()
    bracket.fail(job.lam, job.seed, updates=60)
    again = make_bracket(world, near(1.3), state=json.loads(json.dumps(bracket.state())))
    job = again.next_job()
    again.record(dataclasses.replace(world.run(job), updates=80))  # from its checkpoint at 40
    assert again.updates == 60 + 80


def test_a_bracket_that_is_wider_than_asked_has_something_unclear_in_between():
    """Also where its ends lie half-way between places: a plateau near the floor puts them there."""
    wide, dice = 0, np.random.default_rng(0)
    for number in range(300):
        world = World(number)
        left, right, height = (
            dice.uniform(1.3, 1.45),
            dice.uniform(1.4, 1.8),
            dice.normal(0.4, 0.03),
        )
        world.parse = lambda lam, seed, left=left, right=right, height=height: (
            0.8 if lam < left else height if lam < right else 0.0
        )
        bracket = make_bracket(world, (1.3, 1.6), resolution=0.1)
        simulate(world, bracket)
        if bracket.high - bracket.low > 0.1001:
            wide += 1
            between = [lam for lam in bracket.asked if bracket.low < lam < bracket.high]
            assert between, (number, bracket.asked, bracket.low, bracket.high)
            assert not any(bracket.is_clear(bracket.verdict(lam)) for lam in between)
    assert wide > 30


def test_no_trial_is_started_that_may_turn_out_superfluous():
    world = World(0, onset=3.0)
    bracket = make_bracket(world, near(1.3), slots=5)
    for _ in range(5):
        bracket.record(world.run(bracket.next_job()))  # the floor
    jobs = [bracket.next_job() for _ in range(4)]
    assert jobs[3] is None  # three that parse as at λ = 1 pass, whatever the other two do
    bracket.record(world.run(jobs[0]))
    assert bracket.next_job() is None
