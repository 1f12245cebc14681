"""The main loop on fakes that die, hang on to nothing, and are interrupted."""

# ruff: noqa: F811 - the fixtures of test_train_loop

import dataclasses
import json
import math
import random
import signal
from types import SimpleNamespace

import pytest
from fakes import FakeLearner, FakeTeacher, FakeWorkers, Reference, make_scored
from test_train_loop import (
    CLIFF,
    NUM_STEPS,
    collapsing,  # noqa: F401
    config,  # noqa: F401
    data,  # noqa: F401
    in_another_place,
    rows,
    same_files,
)

from listopd_ray.config import FaultsConfig
from listopd_ray.handles import LearnerHandle
from listopd_ray.ledger import committed
from listopd_ray.roles.teacher import Scored
from listopd_ray.supervision import ActorLost, Faults, Interrupted, LearnerLost, LimitReached
from listopd_ray.tracking import Run, read_jsonl
from listopd_ray.train import Loop, from_json, to_json
from listopd_ray.types import ListopdError


class Mortal(FakeLearner):
    """Dies at the n-th call of a verb: `deaths` has (verb, n, "before" or "after")."""

    def __init__(self, events, deaths=(), cliff=None):
        super().__init__(events, cliff=cliff)
        self.deaths = set(deaths)
        self.calls = {}
        self.restarts = 0

    def restart(self, why):
        assert isinstance(why, LearnerLost)
        self.restarts += 1
        self.begin_again()

    def _mortal(self, verb, *arguments):
        self.calls[verb] = n = self.calls.get(verb, 0) + 1
        if (verb, n, "before") in self.deaths:
            raise LearnerLost("learner died: killed")
        result = getattr(super(), verb)(*arguments)
        if (verb, n, "after") in self.deaths:
            raise LearnerLost("learner died: killed")
        return result

    def step(self, *arguments):
        return self._mortal("step", *arguments)

    def publish_weights(self):
        return self._mortal("publish_weights")

    def check_scores(self, *arguments):
        return self._mortal("check_scores", *arguments)

    def save(self, url):
        return self._mortal("save", url)

    def restore(self, *arguments):
        return self._mortal("restore", *arguments)


class Interruptible(FakeWorkers):
    """Somebody ends the process at the n-th time that the driver waits for samples or loads."""

    at = None
    signum = signal.SIGTERM

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.waits = 0

    def _wait(self):
        self.waits += 1
        if self.waits == self.at:
            raise Interrupted(self.signum)

    def fetch(self, works):
        self._wait()
        return super().fetch(works)

    def load_weights(self, weights):
        self._wait()
        return super().load_weights(weights)


@pytest.fixture
def start(data, tokenizer):
    def start(config, *, deaths=(), at=None, teacher=None, learner=None):
        events = []
        learner = learner or Mortal(events, deaths)
        workers = Interruptible(events, tokenizer)
        workers.at = at
        roles = workers, teacher or FakeTeacher(events), learner
        with Run(config, {"data": "a"}) as run:
            results = Loop(config, data, *roles, run, Faults(config.faults)).run()
            run.finish(results)
        return SimpleNamespace(learner=learner, workers=workers, results=results)

    return start


def ledger(config):
    return read_jsonl(run_file(config, "ledger.jsonl"))


def run_file(config, name):
    from listopd_ray.config import run_directory

    return run_directory(config) / name


def without_incarnations(updates):
    return {n: {k: v for k, v in row.items() if k != "incarnation"} for n, row in updates.items()}


DEATHS = [
    *[("step", n, when) for n in (1, 2, 3, 5, NUM_STEPS) for when in ("before", "after")],
    *[("publish_weights", n, when) for n in (1, 2, 4) for when in ("before", "after")],
    *[("save", n, when) for n in (1, 2, 4) for when in ("before", "after")],
    ("check_scores", 1, "before"),
]


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("death", DEATHS, ids=str)
def test_a_run_whose_learner_dies_equals_the_undisturbed_one(
    config,
    start,
    tmp_path,
    death,
    max_staleness,
):
    config = dataclasses.replace(config, max_staleness=max_staleness)
    whole = start(config)
    broken = in_another_place(config, tmp_path)
    outcome = start(broken, deaths=[death])
    assert outcome.learner.restarts == 1
    assert outcome.learner.theta == whole.learner.theta
    assert outcome.results == whole.results
    assert rows(broken) == rows(config)
    assert rows(broken, "samples.jsonl") == rows(config, "samples.jsonl")
    assert rows(broken, "updates.jsonl") == rows(config, "updates.jsonl")
    taken = committed(ledger(broken))
    assert without_incarnations(taken) == without_incarnations(committed(ledger(config)))
    assert {row["incarnation"] for row in taken.values()} <= {1, 2}
    assert len(taken) == NUM_STEPS


def test_a_learner_may_die_while_it_recovers(config, start, tmp_path):
    whole = start(config)
    broken = in_another_place(config, tmp_path)
    deaths = [("step", 4, "after"), ("restore", 1, "after"), ("restore", 2, "before")]
    outcome = start(broken, deaths=deaths)
    assert outcome.learner.restarts == 3
    assert outcome.learner.theta == whole.learner.theta
    assert rows(broken) == rows(config)
    assert len(committed(ledger(broken))) == NUM_STEPS


def test_a_run_interrupted_at_any_wait_rolls_back_to_where_the_undisturbed_one_does(
    collapsing, start, tmp_path
):
    checkpoint = dataclasses.replace(collapsing.checkpoint, every=1)
    config = dataclasses.replace(collapsing, max_staleness=1, checkpoint=checkpoint)
    whole = start(config, learner=Mortal([], cliff=CLIFF))
    for at in range(5, whole.workers.waits + 1):
        broken = dataclasses.replace(config, out=str(tmp_path / f"at-{at}"))
        with pytest.raises(Interrupted):
            start(broken, at=at, learner=Mortal([], cliff=CLIFF))
        assert start(broken, learner=Mortal([], cliff=CLIFF)).learner.theta == whole.learner.theta
        assert same_files(config, broken), at


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_interrupted_at_any_wait_keeps_a_checkpoint_and_goes_on_to_the_same_end(
    config,
    start,
    tmp_path,
    max_staleness,
):
    config = dataclasses.replace(config, max_staleness=max_staleness)
    whole = start(config)
    for at in range(1, whole.workers.waits + 1):
        broken = dataclasses.replace(config, out=str(tmp_path / f"at-{at}"))
        with pytest.raises(Interrupted) as raised:
            start(broken, at=at)
        before = committed(ledger(broken))
        if at > 4:  # the warm start is evaluated
            kept = f"checkpoint after update {len(before)}: the same command goes on"
            assert str(raised.value) == f"interrupted by SIGTERM; {kept}"
            latest = (run_file(broken, "checkpoints") / "LATEST").read_text()
            assert latest.strip() == f"step-{len(before):06d}"
        outcome = start(broken)
        assert outcome.learner.theta == whole.learner.theta
        assert outcome.results == whole.results
        assert rows(broken) == rows(config)
        assert rows(broken, "samples.jsonl") == rows(config, "samples.jsonl")
        assert rows(broken, "updates.jsonl") == rows(config, "updates.jsonl")
        after = committed(ledger(broken))
        assert {n: after[n] for n in before} == before  # nothing is done again
        assert without_incarnations(after) == without_incarnations(committed(ledger(config)))


def test_where_the_last_checkpoint_cannot_be_written_that_is_said(
    config,
    start,
    monkeypatch,
):
    def full(*_, **__):
        raise ListopdError("runs/x: cannot write: No space left on device")

    monkeypatch.setattr(Run, "save", full)
    with pytest.raises(Interrupted) as raised:
        start(
            dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=0)),
            at=10,
        )
    expected = "interrupted by SIGTERM; no checkpoint of update 2: runs/x: cannot write: No space"
    assert str(raised.value).startswith(expected)


def test_a_checkpoint_that_is_there_keeps_its_score_when_the_run_is_interrupted(config, start):
    evaluation = dataclasses.replace(config.evaluation, every=2)
    config = dataclasses.replace(config, evaluation=evaluation)
    scored = {}
    for at in range(5, 40):
        run = dataclasses.replace(config, name=f"at-{at}")
        try:
            start(run, at=at)
        except Interrupted:
            for file in run_file(run, "checkpoints").glob("step-*/manifest.json"):
                step, score = json.loads(file.read_text())["step"], None
                score = json.loads(file.read_text())["score"]
                unfinished = json.loads((file.parent / "state.json").read_text())["unfinished"]
                if unfinished is None and step and step % 2 == 0:
                    scored.setdefault(step, set()).add(score)
    assert set(scored) >= {2, 4, 6}
    assert all(len(found) == 1 and None not in found for found in scored.values())


class Hangs(Mortal):
    """Its third step takes too long, and nobody may replace it; it would finish it all the same."""

    def __init__(self):
        super().__init__([])
        self.dead = False

    def step(self, *arguments):
        if self.dead or self.policy_version == 2:
            self.dead = True  # as the handle does: it ends it before it says so
            raise LearnerLost("learner hung: no answer in 5 s")
        return super().step(*arguments)

    def save(self, url):
        if self.dead:
            raise LearnerLost("learner died")
        return super().save(url)

    def restart(self, why):
        raise LimitReached(f"{why}; faults.max_restarts=0")


def test_a_learner_that_is_lost_for_good_leaves_the_checkpoint_before(config, start, tmp_path):
    with pytest.raises(LimitReached) as raised:
        start(config, learner=Hangs())
    expected = "learner hung: no answer in 5 s; faults.max_restarts=0"
    assert str(raised.value).startswith(expected)
    whole = in_another_place(config, tmp_path)
    assert start(config).learner.theta == start(whole).learner.theta


class InASlot(Hangs):
    """As the learner of a slot: the real handle has nothing to start another with."""

    def restart(self, why):
        self.restarts += 1
        assert self.restarts == 1, "asked for again"
        LearnerHandle([], Faults(FaultsConfig()), None).restart(why)


def test_a_learner_that_nobody_may_replace_ends_its_trial(config, start):
    with pytest.raises(ActorLost, match=r"^learner hung: no answer in 5 s$"):
        start(config, learner=InASlot())


def test_a_prompt_id_with_a_line_separator_does_not_break_the_files(config, start, data):
    before = data.train.prompts
    odd = "a\u2028b\x85c"
    data.train.prompts = [dataclasses.replace(before[0], id=odd), *before[1:]]
    try:
        with pytest.raises(Interrupted):
            start(config, at=12)
        start(config)
    finally:
        data.train.prompts = before
    ids = {
        i for row in committed(ledger(config)).values() for p in row["samples"] for i, _ in p["ids"]
    }
    assert odd in ids


def test_a_run_whose_metrics_are_gone_is_not_continued(config, start):
    with pytest.raises(Interrupted):
        start(config, at=12)
    run_file(config, "metrics.jsonl").unlink()
    with pytest.raises(ListopdError, match="is not that of the checkpoint after update"):
        start(config)


def test_held_out_lists_without_relevance_do_not_end_a_run(config, start, data, monkeypatch):
    nothing = {key: (0.0,) * len(value) for key, value in data.evaluation.relevance.items()}
    monkeypatch.setattr(data.evaluation, "relevance", nothing)
    start(config)
    assert len(rows(config)) == NUM_STEPS + 1


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_checkpoints_may_lie_elsewhere_and_are_those_of_one_run(config, start, tmp_path, scheme):
    place = f"{scheme}{tmp_path}/elsewhere"
    checkpoint = dataclasses.replace(config.checkpoint, path=place)
    config = dataclasses.replace(config, checkpoint=checkpoint)
    whole = start(dataclasses.replace(config, name="whole"))
    with pytest.raises(Interrupted):
        start(config, at=9)
    assert start(config).learner.theta == whole.learner.theta
    assert not run_file(config, "checkpoints").exists()
    other = dataclasses.replace(config, out=str(tmp_path / "other"), seed=5)
    with pytest.raises(ListopdError, match=r"checkpoints of another run: .*seed \(0 → 5\)"):
        start(other)


class Unfit(FakeTeacher):
    """Says no number for some samples of the first of every batch's two parts."""

    def __init__(self, count):
        super().__init__([])
        self.count, self.calls = count, 0

    def score(self, generated):
        works, self.calls = super().score(generated), self.calls + 1
        if self.calls % 2 == 0:
            return works
        first = works[0].value.rollouts
        unfit = [make_scored(s.rollout, math.nan) for s in first[: self.count]]
        scored = Scored(rollouts=(*unfit, *first[self.count :]), seconds=0.0)
        return [Reference(scored), *works[1:]]


def test_a_sample_without_a_score_is_left_out_counted_and_in_the_ledger(
    config,
    start,
):
    outcome = start(config, teacher=Unfit(1))
    assert [len(batch) for batch in outcome.learner.batches] == [9] * NUM_STEPS
    for row in committed(ledger(config)).values():
        assert len(row["dropped"]) == 1
        assert row["dropped"][0][2] == "teacher"
        assert sum(len(part["ids"]) for part in row["samples"]) == 9
    counted = [
        row.get("fault/dropped_teacher") for row in read_jsonl(run_file(config, "metrics.jsonl"))
    ]
    assert counted == [None] + [1.0] * NUM_STEPS


def test_too_many_of_them_end_the_run_with_their_reason_and_a_checkpoint(
    config,
    start,
):
    with pytest.raises(LimitReached) as raised:
        start(config, teacher=Unfit(2))
    assert str(raised.value) == (
        "2 of 10 samples are unfit (teacher: 2): more than faults.max_dropped=0.1; "
        "checkpoint after update 0: the same command goes on"
    )


class Numb(Mortal):
    """Its gradient is not finite in some updates."""

    def __init__(self, numb):
        super().__init__([])
        self.numb = numb

    def step(self, scored, lam, lr, meanwhile):
        theta, metrics = self.theta, super().step(scored, lam, lr, meanwhile)
        if self.policy_version - 1 in self.numb:
            self.theta = theta
            del metrics["kl/reverse"]
        return metrics | {"train/skipped": float(self.policy_version - 1 in self.numb)}


def test_updates_that_are_skipped_are_counted_and_some_in_a_row_end_the_run(
    config,
    start,
    tmp_path,
):
    start(config, learner=Numb({1, 2, 4, 5}))
    assert [row["train/skipped"] for row in rows(config)[1:]] == [0, 1, 1, 0, 1, 1, 0]
    broken = in_another_place(config, tmp_path)
    with pytest.raises(ListopdError, match="update 4: alarm: 3 updates in a row skipped"):
        start(broken, learner=Numb({1, 2, 3, 4}))
    assert rows(broken, "events.jsonl")[0]["action"] == "stop"
    assert len(rows(broken)) == 5


def test_or_bring_it_back_to_where_all_was_well(config, start):
    faults = FaultsConfig(max_skipped=2, skipped_action="rollback")
    learner = Numb({4, 5})
    original = learner.restore

    def restore(*arguments):
        learner.numb = set()  # it was a passing fault
        original(*arguments)

    learner.restore = restore
    start(dataclasses.replace(config, faults=faults), learner=learner)
    (event,) = rows(config, "events.jsonl")
    assert (event["action"], event["step"]) == ("rollback", 6)
    assert [row["train/skipped"] for row in rows(config)[1:]] == [0] * NUM_STEPS
    assert len(committed(ledger(config))) == NUM_STEPS


def test_samples_under_way_survive_json_bit_for_bit(data, tokenizer):
    import numpy as np

    workers = FakeWorkers([], tokenizer)
    workers.load_weights({"policy_version": 3, "theta": 0.1, "completions": [0, 1, 2, 3]})
    parts = workers.fetch(workers.generate(data.train.prompts, "x", group_size=2))
    noise = np.random.default_rng(0)
    for part in parts:
        for rollout in part.rollouts:
            values = noise.normal(size=len(rollout.token_ids)).astype(np.float32)
            object.__setattr__(rollout, "sampler_logprobs", values)
    again = from_json(json.loads(json.dumps(to_json(parts))), data.train.prompts)
    for before, after in zip(parts, again, strict=True):
        assert (before.seconds, before.attempt) == (after.seconds, after.attempt)
        for a, b in zip(before.rollouts, after.rollouts, strict=True):
            assert a.prompt is b.prompt
            for name in ("token_ids", "sampler_logprobs"):
                x, y = getattr(a, name), getattr(b, name)
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
            for name in ("sample_index", "finish_reason", "policy_version"):
                assert getattr(a, name) == getattr(b, name)


class Unlucky(Mortal):
    """Dies before or after any call, by a die."""

    def __init__(self, events, dice):
        super().__init__(events, cliff=CLIFF)
        self.dice = dice

    def _mortal(self, verb, *arguments):
        n = self.calls.get(verb, 0) + 1
        if self.dice.random() < 0.05:
            self.deaths = {(verb, n, self.dice.choice(["before", "after"]))}
        return super()._mortal(verb, *arguments)


class Ends(Exception):  # noqa: N818 - what happens, not what went wrong
    """The process is killed."""


@pytest.mark.parametrize("seed", range(8))
def test_deaths_signals_and_kills_in_a_run_that_rolls_back_change_nothing(
    collapsing, data, tokenizer, tmp_path, monkeypatch, seed
):
    dice = random.Random(seed)
    checkpoint = dataclasses.replace(collapsing.checkpoint, every=dice.randint(1, 4))
    whole = dataclasses.replace(
        collapsing, max_staleness=seed % 2, checkpoint=checkpoint, name="whole"
    )
    broken = dataclasses.replace(whole, name="broken")
    log, save = Run.log, Run.save

    def mishap(*errors):
        if run is broken and dice.random() < 0.04:
            raise dice.choice(errors)

    def around(verb, *errors):
        def call(*arguments, **options):
            mishap(*errors)
            result = verb(*arguments, **options)
            mishap(Ends)
            return result

        return call

    def waits(verb):
        return around(verb, Ends, Interrupted(signal.SIGTERM))

    class Workers(FakeWorkers):
        fetch, load_weights = waits(FakeWorkers.fetch), waits(FakeWorkers.load_weights)

    class Teacher(FakeTeacher):
        fetch = waits(FakeTeacher.fetch)

    monkeypatch.setattr(Run, "log", around(log, Ends))
    monkeypatch.setattr(Run, "save", around(save, Ends))
    ends = []
    for run in (whole, broken):
        for _ in range(60):
            learner = Unlucky([], dice) if run is broken else Mortal([], cliff=CLIFF)
            try:
                with Run(run, {"data": "a"}) as opened:
                    roles = Workers([], tokenizer), Teacher([]), learner
                    results = Loop(run, data, *roles, opened, Faults(run.faults)).run()
                    ends.append((results, learner.theta))
                    break
            except (Ends, Interrupted):
                continue
    assert ends[0] == ends[1]
    assert same_files(whole, broken)
    updates = [without_incarnations(committed(ledger(run))) for run in (whole, broken)]
    assert updates[0] == updates[1]
