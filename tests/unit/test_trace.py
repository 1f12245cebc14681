"""The trace of a run: what it says of the driver's stages and of the actors."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from fakes import FakeLearner, FakeTeacher, FakeWorkers
from test_train_loop import config, data  # noqa: F401 - fixtures

from listopd_ray import trace as trace_module
from listopd_ray.supervision import Faults, Interrupted
from listopd_ray.trace import Trace, write_trace
from listopd_ray.tracking import Run
from listopd_ray.train import Loop

ACTORS = {"a" * 32: "rollout 0", "b" * 32: "rollout 0", "c" * 32: "teacher 0", "d" * 32: "learner"}


@pytest.fixture
def clock(monkeypatch):
    """A wall clock, one µs later at every look; its list's number is added, in ns."""
    late = [0]
    ticks = itertools.count(5_000_000, 1000)
    monkeypatch.setattr(trace_module.time, "time_ns", lambda: next(ticks) + late[0])
    return late


@pytest.fixture
def traced_run(config, data, tokenizer):  # noqa: F811 - the fixtures imported above
    """Runs the loop on fakes; the trace."""

    def run(trace, **changes):
        events = []
        roles = FakeWorkers(events, tokenizer), FakeTeacher(events), FakeLearner(events)
        changed = dataclasses.replace(config, **changes)
        with Run(changed, {"data": "a"}) as opened:
            Loop(changed, data, *roles, opened, Faults(changed.faults), trace).run()
        return trace

    return run


def written(tmp_path, trace, timeline=()):
    file = Path(tmp_path, "trace.json")
    write_trace(file, "run", trace, list(timeline), ACTORS)
    return json.loads(file.read_text())


def blocks_by_row(content):
    """[(name, start, end)] of every row, with the names of the rows."""
    events = content["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            ends = event["ts"] + event["dur"]
            rows[names[event["tid"]]].append((event["name"], event["ts"], ends))
    return rows


def inside(outer, blocks):
    """Names of those that lie within it."""
    _, start, end = outer
    return [name for name, s, e in blocks if start <= s and e <= end and (s, e) != (start, end)]


def call(actor, method, start, duration, process):
    """As in `ray.timeline`: the call, and its phase that is known by the process alone."""
    common = {"pid": "10.0.0.1", "tid": f"worker:{process}", "ph": "X", "cname": "x"}
    task = {"name": method, "task_id": "0123456789abcdef" + actor}
    return [
        {**common, "cat": "task:execute", "name": "task:execute", "args": {}}
        | {"ts": start + 1.0, "dur": duration - 2.0},
        {**common, "cat": f"task::Role.{method}", "name": method, "args": task}
        | {"ts": start, "dur": duration},
    ]


def test_every_turn_holds_its_stages_in_order(traced_run, clock, tmp_path):
    rows = blocks_by_row(written(tmp_path, traced_run(Trace(True), num_steps=2)))
    assert list(rows) == ["driver"]
    names = [name for name, _, _ in rows["driver"]]
    assert names[:5] == ["publish", "load_weights", "gate", "evaluate", "turn"]
    turns = [block for block in rows["driver"] if block[0] == "turn"]
    stages = ["wait for rollouts", "wait for scores", "learn", "publish", "load_weights"]
    assert inside(turns[0], rows["driver"]) == stages
    assert inside(turns[1], rows["driver"]) == [*stages, "evaluate", "checkpoint"]
    assert turns[0][2] <= turns[1][1]
    assert all(end > start >= 0 for _, start, end in rows["driver"])


def test_a_stage_takes_what_the_clock_says(clock, tmp_path):
    trace = Trace(True)
    with trace.span("learn", step=3):
        clock[0] += 2_500_000
    events = written(tmp_path, trace)["traceEvents"]
    (block,) = [event for event in events if event["ph"] == "X"]
    assert (block["name"], block["args"]) == ("learn", {"step": 3})
    assert (block["ts"], block["dur"]) == (1.0, 2501.0)  # µs, with the clock's own tick


def test_a_stage_that_fails_is_in_the_trace(clock):
    trace = Trace(True)
    with pytest.raises(Interrupted), trace.span("turn"), trace.span("learn"):
        raise Interrupted(15)
    assert [block["name"] for block in trace.stages] == ["learn", "turn"]


def test_without_a_trace_nothing_is_kept(traced_run):
    assert traced_run(Trace(False)).stages == []


def test_the_actors_calls_lie_in_rows_named_after_their_roles(clock, tmp_path):
    trace = Trace(True)
    begin = trace.begin_ns / 1e3
    timeline = [
        *call("d" * 32, "step", begin + 40.0, 20.0, process="4"),
        *call("a" * 32, "generate", begin + 10.0, 20.0, process="1"),
        *call("c" * 32, "score", begin + 30.0, 10.0, process="3"),
        *call("b" * 32, "generate", begin + 70.0, 5.0, process="2"),  # in the first one's place
    ]
    rows = blocks_by_row(written(tmp_path, trace, timeline))
    assert list(rows) == ["driver", "learner", "rollout 0", "teacher 0"]
    # Times of today have no more digits than for a quarter of a µs.
    assert rows["learner"][0] == ("step", pytest.approx(40), pytest.approx(60))
    assert rows["learner"][1] == ("execute", pytest.approx(41), pytest.approx(59))
    assert [name for name, _, _ in rows["rollout 0"]] == ["generate", "execute"] * 2


def test_other_runs_actors_drivers_and_times_are_left_out(clock, tmp_path):
    trace = Trace(True)
    begin = trace.begin_ns / 1e3
    driver = {"pid": "10.0.0.1", "tid": "driver:0", "ph": "X", "cat": "submit_task", "cname": "x"}
    timeline = [
        *call("e" * 32, "step", begin + 10.0, 20.0, process="5"),  # of another run
        *call("a" * 32, "generate", begin - 30.0, 20.0, process="1"),  # of the sitting before
        {**driver, "name": "submit_task", "ts": begin + 10.0, "dur": 1.0, "args": {}},
    ]
    assert blocks_by_row(written(tmp_path, trace, timeline)) == {"driver": []}


def test_all_events_are_of_one_process_with_whole_numbers_for_ids(clock, tmp_path):
    trace = Trace(True)
    with trace.span("turn"):
        pass
    timeline = call("a" * 32, "generate", trace.begin_ns / 1e3 + 10.0, 20.0, process="1")
    content = written(tmp_path, trace, timeline)
    assert {event["pid"] for event in content["traceEvents"]} == {1}
    assert all(isinstance(event["tid"], int) for event in content["traceEvents"])
    assert {event["ph"] for event in content["traceEvents"]} == {"M", "X"}
    process = next(e for e in content["traceEvents"] if e["name"] == "process_name")
    assert process["args"]["name"] == "run"
    blocks = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert blocks == sorted(blocks, key=lambda block: block["ts"])
