import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeLearner, FakeTeacher, FakeWorkers, Interrupted

from listopd_ray import tracking, train
from listopd_ray.checkpoint import Checkpoints
from listopd_ray.config import (
    AlarmConfig,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    GovernorConfig,
    Schedule,
    TrackingConfig,
)
from listopd_ray.models import encode_prompt
from listopd_ray.roles.rollout import Generated
from listopd_ray.supervision import Faults
from listopd_ray.task.contract import TokenText
from listopd_ray.tracking import TIMING, Run, progress_bar
from listopd_ray.train import Batch, Loop, queue_metrics
from listopd_ray.types import ListopdError, Prompt

NUM_STEPS = 7


@pytest.fixture
def config(tmp_path):
    return Config(
        name="run",
        out=str(tmp_path / "runs"),
        num_steps=NUM_STEPS,
        num_prompts=5,
        group_size=2,
        lr=0.1,
        lam=1.5,
        lam_schedule=Schedule(kind="linear", final=1.0),
        lr_schedule=Schedule(kind="warmup", steps=3),
        evaluation=EvaluationConfig(every=3, num_prompts=4, num_samples=2),
        checkpoint=CheckpointConfig(every=2, keep=2),
        tracking=TrackingConfig(wandb=False),
    )


@pytest.fixture(scope="module")
def data(examples, tokenizer):
    """What the loop uses of the prepared inputs; 12 prompts, so that 5 a step cross an epoch."""

    def split(part):
        prompts = [
            Prompt(id=e.id, token_ids=encode_prompt(tokenizer, e, chat_template=False), num_items=3)
            for e in part
        ]
        relevance = {example.id: example.relevance for example in part}
        return SimpleNamespace(examples=part, prompts=prompts, relevance=relevance)

    return SimpleNamespace(
        train=split(examples[:12]),
        evaluation=split(examples[12:18]),
        text=TokenText(tokenizer, (tokenizer.eos_token_id,)),
        student_path=Path("student"),
    )


@pytest.fixture
def start(data, tokenizer):
    """Runs the loop on fakes from scratch, as a new process would; returns what it left behind."""

    def start(config, fail_at=None, finish=True, data_hash="a", cliff=None, file=None):
        events = []
        learner = FakeLearner(events, fail_at, cliff)
        workers, teacher = FakeWorkers(events, tokenizer), FakeTeacher(events)
        outcome = SimpleNamespace(events=events, learner=learner, results=None)
        with Run(config, {"data": data_hash}) as run:
            try:
                roles = workers, teacher, learner
                loop = Loop(config, data, *roles, run, Faults(config.faults), warm_start_file=file)
                outcome.results = loop.run()
            except Interrupted:
                return outcome
            if finish:
                run.finish(outcome.results)
        return outcome

    return start


def in_another_place(config, tmp_path):
    return dataclasses.replace(config, out=str(tmp_path / "other"))


def rows(config, name="metrics.jsonl"):
    """Lines of a run's file without what the clock says."""
    with open(f"{config.out}/{config.name}/{name}", encoding="utf-8") as file:
        parsed = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in parsed]


def verbs_of_the_loop(events):
    """Training alone: its generations, updates and weight syncs."""
    return [
        f"generate {what}" if verb == "generate" else f"{verb} {what}"
        for verb, what in events
        if verb in ("learner.step", "load_weights") or str(what).startswith("train/")
    ]


def test_on_policy_order_is_sample_learn_publish(config, start):
    outcome = start(dataclasses.replace(config, num_steps=3, max_staleness=0))
    assert verbs_of_the_loop(outcome.events) == [
        "load_weights 0",
        "generate train/0",
        "learner.step 0",
        "load_weights 1",
        "generate train/1",
        "learner.step 1",
        "load_weights 2",
        "generate train/2",
        "learner.step 2",
        "load_weights 3",
    ]


def test_with_staleness_one_the_next_batch_is_sampled_before_the_update(config, start):
    no_saves = dataclasses.replace(config.checkpoint, every=0)
    changes = {"num_steps": 3, "max_staleness": 1, "checkpoint": no_saves}
    outcome = start(dataclasses.replace(config, **changes))
    assert verbs_of_the_loop(outcome.events) == [
        "load_weights 0",
        "generate train/0",
        "generate train/1",
        "learner.step 0",
        "load_weights 1",
        "generate train/2",
        "learner.step 1",
        "load_weights 2",
        "learner.step 2",  # and nothing is sampled that no step would use
        "load_weights 3",
    ]


def test_staleness_is_exactly_what_the_configuration_says(config, start):
    assert start(config).learner.staleness == [{0}] * NUM_STEPS
    overlapping = dataclasses.replace(config, name="overlapping", max_staleness=1)
    assert start(overlapping).learner.staleness == [{0}] + [{1}] * (NUM_STEPS - 1)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_each_update_sees_its_own_prompts_in_groups(config, start, data, max_staleness):
    batches = start(dataclasses.replace(config, max_staleness=max_staleness)).learner.batches
    assert all(batch[::2] == batch[1::2] for batch in batches)  # two samples a prompt
    drawn = [prompt for batch in batches for prompt in batch[::2]]
    everything = {prompt.id for prompt in data.train.prompts}
    assert set(drawn[:12]) == set(drawn[12:24]) == everything  # each epoch shows all
    assert drawn[:12] != drawn[12:24]


def test_the_gate_and_the_first_evaluation_come_before_any_update(config, start):
    outcome = start(config)
    assert ("score_with", Path("student")) in outcome.events  # the student as its own teacher
    events = [verb if verb != "generate" else tag for verb, tag in outcome.events]
    begin = ["load_weights", "gate", "score_with", "check_scores", "evaluation", "evaluation"]
    assert events[: len(begin)] == begin
    assert events.count("gate") == events.count("check_scores") == 1


def test_runs_that_begin_alike_evaluate_the_warm_start_once(config, start, tmp_path):
    file = tmp_path / "cache" / "warm_start.json"
    start(config, file=file)
    again = in_another_place(config, tmp_path)
    events = start(again, file=file).events
    begin = [verb if verb != "generate" else what for verb, what in events][:5]
    assert begin[:4] == ["load_weights", "gate", "score_with", "check_scores"]
    assert begin[4].startswith("train/")
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(again, name) == rows(config, name)


def test_evaluations_checkpoints_and_schedules_come_when_due(config, start):
    outcome = start(config)
    metrics = rows(config)
    assert [row["train/step"] for row in metrics] == list(range(NUM_STEPS + 1))
    evaluated = [row["train/step"] for row in metrics if "eval/parse_rate" in row]
    assert evaluated == [0, 3, 6, 7]
    assert [version for verb, version in outcome.events if verb == "save"] == [2, 4, 6, 7]
    assert [row["train/lam"] for row in metrics[1:]] == pytest.approx(
        [1.5 - 0.5 * step / 6 for step in range(NUM_STEPS)]
    )
    assert [row["train/lr"] for row in metrics[1:4]] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert {row["train/step"] for row in rows(config, "samples.jsonl")} == {0, 3, 6, 7}
    assert set(outcome.results) == {"warm_start", "student"}
    assert outcome.results["student"]["parse_rate"] == metrics[-1]["eval/parse_rate"]
    assert outcome.results["warm_start"]["parse_rate"] == metrics[0]["eval/parse_rate"]


def test_parse_rate_and_failures_of_the_training_rollouts_add_up(config, start):
    start(config)
    for row in rows(config)[1:]:
        shares = [value for name, value in row.items() if name.startswith("contract/")]
        assert sum(shares) == pytest.approx(1.0)
        assert row["contract/parse_rate"] * 10 == pytest.approx(
            round(row["contract/parse_rate"] * 10)
        )


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 5, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(
    config, start, tmp_path, fail_at, max_staleness
):
    config = dataclasses.replace(config, max_staleness=max_staleness)
    whole = start(config)
    broken = in_another_place(config, tmp_path)
    assert start(broken, fail_at).results is None
    resumed = start(broken)
    assert resumed.learner.theta == whole.learner.theta
    assert resumed.results == whole.results
    for name in ("metrics.jsonl", "samples.jsonl", "updates.jsonl"):
        assert rows(broken, name) == rows(config, name)
    summaries = [f"{c.out}/{c.name}/summary.json" for c in (config, broken)]
    assert len({open(file).read() for file in summaries}) == 1  # noqa: SIM115
    # What a checkpoint holds is not done again.
    assert len(resumed.learner.batches) == NUM_STEPS - fail_at // 2 * 2


def test_a_run_may_be_interrupted_more_than_once(config, start, tmp_path):
    start(config)
    broken = in_another_place(config, tmp_path)
    for fail_at in (1, 3, 3, 6):
        start(broken, fail_at)
    start(broken)
    assert rows(broken) == rows(config)


def test_updates_done_before_do_not_count_in_the_rate(config, start, capsys):
    start(config, 5)
    capsys.readouterr()
    start(config)
    assert re.search(rf" 4/{NUM_STEPS} \[\d+:\d+<\?, +\?update/s", capsys.readouterr().err)


def test_the_bar_says_what_it_waits_for_and_the_first_evaluation_is_no_part_of_the_rate(
    config, start, monkeypatch
):
    bars, said, elapsed = [], [], []

    def bar(*arguments):
        bars.append(progress_bar(*arguments))
        return bars[0]

    def evaluate(*arguments):
        said.append(bars[0].desc)
        time.sleep(0.0 if elapsed else 1.0)
        return evaluated(*arguments)

    def step(self, *arguments):
        elapsed.append(bars[0].format_dict["elapsed"])
        assert bars[0].desc == "run: "
        return stepped(self, *arguments)

    evaluated, stepped = train.evaluate, FakeLearner.step
    monkeypatch.setattr(train, "progress_bar", bar)
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(FakeLearner, "step", step)
    start(config)
    assert said == ["run, evaluation: "] * 4
    assert elapsed[0] < 0.9


def test_a_run_stopped_before_its_summary_finishes_without_another_update(config, start):
    whole = start(config, finish=False)
    before = rows(config)
    again = start(config)
    assert again.learner.batches == []
    assert again.results == whole.results
    assert rows(config) == before


def test_a_finished_run_refuses_to_start_again(config, start):
    start(config)
    before = rows(config)
    with pytest.raises(ListopdError, match="finished"):
        start(config)
    assert rows(config) == before


def test_a_run_begun_with_another_configuration_refuses_and_names_the_keys(config, start):
    start(config, fail_at=3)
    changed = dataclasses.replace(
        config, lam=1.7, evaluation=dataclasses.replace(config.evaluation, every=5)
    )
    with pytest.raises(ListopdError) as raised:
        start(changed)
    message = str(raised.value)
    assert "lam (1.5 → 1.7)" in message
    assert "evaluation.every (3 → 5)" in message
    assert "clip" not in message
    assert start(config).results  # the run itself is untouched


def test_a_run_begun_on_other_data_refuses_to_continue(config, start):
    start(config, fail_at=3)
    with pytest.raises(ListopdError, match=r"begun on other data or models: data \(a → b\)"):
        start(config, data_hash="b")
    assert start(config).results


def test_a_line_cut_short_by_a_full_disk_does_not_stop_the_resumption(config, start, tmp_path):
    start(config)
    broken = in_another_place(config, tmp_path)
    start(broken, fail_at=3)
    with open(f"{broken.out}/run/metrics.jsonl", "a") as file:
        file.write('{"train/step": 4, "kl/rev')
    start(broken)
    assert rows(broken) == rows(config)


CLIFF = 2.0  # of the fake learner


@pytest.fixture
def collapsing(config):
    """λ rises to 3 over six updates and crosses the cliff with the fourth, at 2⅓.

    Half of the distance to 1, as after one roll-back, never does.
    """
    return dataclasses.replace(
        config,
        num_steps=10,
        lam=3.0,
        lam_schedule=Schedule(kind="warmup", initial=1.0, steps=6),
        evaluation=EvaluationConfig(every=100, num_prompts=4, num_samples=2),
        alarm=AlarmConfig(action="rollback", patience=2),
    )


def asked(step):
    return 1 + 2 * min(6, step + 1) / 6


def with_alarm(config, **changes):
    return dataclasses.replace(config, alarm=dataclasses.replace(config.alarm, **changes))


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_collapse_rolls_back_to_a_healthy_checkpoint_and_goes_on_lower(
    collapsing, start, max_staleness
):
    config = dataclasses.replace(collapsing, max_staleness=max_staleness)
    outcome = start(config, cliff=CLIFF)
    # The fourth update breaks the answers, so the fifth one's rollouts are the first bad ones, and
    # the average of the parse rate (0.64, 0.41, 0.28) is below half twice in a row after seven.
    # With the batch before sampled ahead, all that comes an update later.
    (event,) = rows(config, "events.jsonl")
    assert event == {
        "step": 7 + max_staleness,
        "action": "rollback",
        "reason": event["reason"],
        "lam": 3.0,
    }
    assert event["reason"].startswith("training parses 0.")
    metrics = rows(config)
    assert [row["train/step"] for row in metrics] == list(range(11))
    kept = 2  # the checkpoint after four is broken, though no rollout had shown it when it was made
    lams = [row["train/lam"] for row in metrics[1:]]
    assert lams[:kept] == pytest.approx([asked(step) for step in range(kept)])
    assert lams[kept:] == pytest.approx([1 + (asked(step) - 1) / 2 for step in range(kept, 10)])
    assert {row["contract/parse_rate"] for row in metrics[1:]} == {1.0}
    assert outcome.results["student"]["parse_rate"] == 1.0


def test_a_run_goes_back_to_its_warm_start_where_no_later_checkpoint_was_healthy(collapsing, start):
    config = dataclasses.replace(collapsing, lam_schedule=Schedule())  # λ = 3 from the beginning
    start(config, cliff=CLIFF)
    (event,) = rows(config, "events.jsonl")
    assert event["lam"] == 3.0
    assert [row["train/lam"] for row in rows(config)[1:]] == [2.0] * 10


def test_roll_backs_add_up_and_past_the_last_one_the_run_stops_with_its_reason(collapsing, start):
    steep = dataclasses.replace(collapsing, lam=9.0)
    start(with_alarm(steep, max_rollbacks=3), cliff=CLIFF)
    events = rows(steep, "events.jsonl")
    assert [event["action"] for event in events] == ["rollback"] * 3
    assert rows(steep)[-1]["train/lam"] == 1 + 8 / 2**3
    stopped = with_alarm(dataclasses.replace(steep, name="stopped"), max_rollbacks=2)
    with pytest.raises(ListopdError) as raised:
        start(stopped, cliff=CLIFF)
    last = rows(stopped, "events.jsonl")[-1]
    assert [e["action"] for e in rows(stopped, "events.jsonl")] == ["rollback", "rollback", "stop"]
    assert str(raised.value) == (
        f"stopped: update {last['step']}: alarm: {last['reason']}; stopped at λ = {last['lam']:.3g}"
    )


def test_a_run_told_to_stop_does_so_at_once_and_one_told_to_warn_goes_on(collapsing, start, capsys):
    warned = with_alarm(collapsing, action="warn")
    start(warned, cliff=CLIFF)
    (event,) = rows(warned, "events.jsonl")  # once, though it rings until the end
    assert (event["step"], event["action"]) == (7, "warn")
    assert f"run: update 7: alarm: {event['reason']}; warn\n" in capsys.readouterr().err
    assert [row["train/lam"] for row in rows(warned)[1:]] == [asked(step) for step in range(10)]
    assert rows(warned)[-1]["contract/parse_rate"] == 0
    stopped = with_alarm(dataclasses.replace(collapsing, name="stopped"), action="stop")
    with pytest.raises(ListopdError, match=r"^stopped: update 7: alarm: training parses"):
        start(stopped, cliff=CLIFF)
    assert rows(stopped) == rows(warned)[:8]
    with pytest.raises(ListopdError, match=r"^stopped: update 7: "):
        start(stopped, cliff=CLIFF)  # again and again: another λ is another run


def test_a_collapse_that_only_the_last_evaluation_shows_is_rolled_back_too(collapsing, start):
    # The eighth and last update is the one that breaks.
    schedule = Schedule(kind="warmup", initial=1.0, steps=8)
    config = dataclasses.replace(collapsing, num_steps=8, lam=2.05, lam_schedule=schedule)
    outcome = start(config, cliff=CLIFF)
    (event,) = rows(config, "events.jsonl")
    assert event["step"] == 8
    assert event["reason"] == "evaluation parses 0.000, best was 1.000"
    assert outcome.results["student"]["parse_rate"] == 1.0
    assert rows(config)[-1]["train/lam"] == pytest.approx(1.525)


def same_files(config, other):
    return all(
        rows(config, name) == rows(other, name)
        for name in ("metrics.jsonl", "samples.jsonl", "updates.jsonl", "events.jsonl")
    )


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize("fail_after", [3, 6, 7, 8, 9, 12])
def test_a_run_interrupted_before_or_after_its_roll_back_equals_the_uninterrupted_one(
    collapsing, start, tmp_path, monkeypatch, fail_after, max_staleness
):
    config = dataclasses.replace(collapsing, max_staleness=max_staleness)
    whole = start(config, cliff=CLIFF)
    broken = in_another_place(config, tmp_path)
    log, calls = Run.log, []

    def interrupt(self, step, metrics):
        log(self, step, metrics)
        calls.append(step)
        if len(calls) == 1 + fail_after:  # of all updates, those taken twice included
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupt)
        assert start(broken, cliff=CLIFF).results is None
    resumed = start(broken, cliff=CLIFF)
    assert same_files(config, broken)
    assert resumed.results == whole.results
    assert resumed.learner.theta == whole.learner.theta
    assert rows(broken)[-1]["train/lam"] == 2.0


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Checkpoints, "drop_unhealthy"),
        (tracking, "replace_file"),
        (Run, "roll_back"),
        (FakeLearner, "restore"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_may_end_anywhere_in_a_roll_back(
    collapsing, start, tmp_path, monkeypatch, owner, name, when
):
    # A checkpoint after each update: one is always due when the alarm rings.
    config = dataclasses.replace(collapsing, checkpoint=CheckpointConfig(every=1, keep=3))
    saved = [version for verb, version in start(config, cliff=CLIFF).events if verb == "save"]
    # None of update 7, which rings, and the one gone back to (3) stays as it was.
    assert saved == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10]
    broken = in_another_place(config, tmp_path)
    verb, recorded = getattr(owner, name), Run.record

    def end(*arguments):
        if when == "after":
            verb(*arguments)
        raise Interrupted

    def record(self, event):
        patch.setattr(owner, name, end)
        return recorded(self, event)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", record)
        assert start(broken, cliff=CLIFF).results is None
    start(broken, cliff=CLIFF)
    assert same_files(config, broken)
    assert len(rows(broken, "events.jsonl")) == 1


def test_a_governed_run_begins_at_one_and_a_wrong_prediction_ends_it(collapsing, start, tmp_path):
    config = dataclasses.replace(collapsing, governor=GovernorConfig(enabled=True))
    start(config, cliff=CLIFF)
    # The fakes have no masses to measure, so that nothing more is ever known.
    assert [row["train/lam"] for row in rows(config)[1:]] == [1.0] * 10
    file = tmp_path / "prediction.json"
    file.write_text('{"lambda_star": 1.5, "clip": 3.0}')
    with pytest.raises(ListopdError, match=r"prediction\.json: is for c = 3, the run has c = 2$"):
        start(dataclasses.replace(config, name="other", prediction=str(file)))


@pytest.mark.parametrize("action", ["warn", "stop"])
@pytest.mark.parametrize("fail_at", [1, 3, 5, 7, 8, 9])
def test_a_resumed_run_over_the_cliff_records_its_alarm_once(
    collapsing, start, tmp_path, action, fail_at
):
    config = with_alarm(collapsing, action=action)
    broken = in_another_place(config, tmp_path)

    def run(config, **options):
        with contextlib.suppress(ListopdError):  # of the stop
            start(config, cliff=CLIFF, **options)
        file = Path(config.out) / config.name / "events.jsonl"
        return rows(config, "events.jsonl") if file.exists() else []

    run(broken, fail_at=fail_at)
    assert run(broken) == run(config) != []
    assert rows(broken) == rows(config)


def waits(config):
    """time/queue_wait_s of every update; None where it is left out."""
    with open(f"{config.out}/{config.name}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line).get("time/queue_wait_s") for line in file][1:]


def test_queue_wait_is_the_time_from_asking_to_taking_up_less_that_of_the_slowest_worker():
    parts = {n: Generated(rollouts=(), seconds=seconds) for n, seconds in enumerate((2.0, 3.0))}
    assert queue_metrics(Batch({}, {}, [], parts, asked=10.0), 17.5) == {"time/queue_wait_s": 4.5}
    assert queue_metrics(Batch({}, {}, [], parts, asked=10.0), 12.9) == {"time/queue_wait_s": 0.0}
    assert queue_metrics(Batch({}, {}, [], parts), 17.5) == {}


@pytest.mark.parametrize(("max_staleness", "waited"), [(0, [0, 0, 0]), (1, [0, 8, 8])])
def test_samples_drawn_ahead_wait_for_the_learner(
    config, start, monkeypatch, max_staleness, waited
):
    now = [100.0]
    step = FakeLearner.step

    def slow_step(self, *arguments):
        now[0] += 8.0
        return step(self, *arguments)

    monkeypatch.setattr(FakeLearner, "step", slow_step)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = dataclasses.replace(config, num_steps=3, max_staleness=max_staleness)
    start(config)
    assert waits(config) == waited


def test_samples_out_of_a_checkpoint_have_no_queue_wait(config, start):
    config = dataclasses.replace(config, max_staleness=1)
    start(config, fail_at=4)  # the checkpoint is of update 4, with the samples for the fifth
    start(config)
    assert [wait is None for wait in waits(config)] == [False] * 4 + [True] + [False] * 2
