"""What `listopd watch` says of directories made here, at times that the tests set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from listopd_ray.config import Config, EvaluationConfig, dump_config
from listopd_ray.following import JobView, Rows, RunView, open_view
from listopd_ray.job_config import (
    Curve,
    SearchConfig,
    SearchSection,
    StudyConfig,
    StudySection,
    WatchConfig,
)
from listopd_ray.tracking import lock_directory
from listopd_ray.types import ListopdError
from listopd_ray.watch import render, sparkline, summary_line, watch

BEGUN = 1_000_000.0
STEP_S, EVALUATION_S, START_S = 2.0, 10.0, 10.0  # of the runs below


class FakeRun:
    """A run that writes its files as the main loop does, on a clock of its own."""

    def __init__(self, directory, **changes):
        self.directory, self.now = directory, BEGUN
        defaults = dict(num_steps=40, lam=1.3, evaluation=EvaluationConfig(every=10))
        self.config = Config(name=directory.name, **(defaults | changes))
        directory.mkdir(parents=True)
        self.write("config.yaml", dump_config(self.config))
        self.step = -1

    def write(self, name, text):
        file = self.directory / name
        file.write_text(text)
        os.utime(file, (self.now, self.now))

    def rows(self):
        file = self.directory / "metrics.jsonl"
        return file.read_text() if file.exists() else ""

    def update(self, count=1):
        for _ in range(count):
            self.step += 1
            row = {"train/step": self.step}
            self.now += START_S if self.step == 0 else STEP_S
            if self.step > 0:
                row |= {"contract/parse_rate": self.step / 40, "time/step_s": STEP_S}
                row |= {"train/lam": 1.3, "cliff/lambda_star": 1.334, "cliff/headroom": 0.034}
            if self.step % 10 == 0:
                row |= {"eval/parse_rate": 0.5}
                self.now += EVALUATION_S if self.step > 0 else 0.0
            self.write("metrics.jsonl", self.rows() + json.dumps(row) + "\n")

    def finish(self):
        student = {"parse_rate": 0.75}
        summary = {"lam": self.config.lam, "seed": self.config.seed, "student": student}
        summary |= {"num_steps": self.config.num_steps, "seconds": self.now - BEGUN}
        self.write("summary.json", json.dumps(summary))


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "mine")


def looked_at(run, later=0.0):
    view = RunView(run.directory, lambda: run.now + later)
    view.look()
    return view


def shown(view, width=80, height=None):
    console = Console(file=StringIO(), width=width)
    console.print(render(view, height))
    return console.file.getvalue()


def test_rows_are_read_once_and_a_torn_last_line_waits_for_its_end(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = Rows(file)
    assert rows.new() == (False, [])
    file.write_text('{"train/step": 0}\n{"train/step"')
    assert rows.new() == (False, [{"train/step": 0}])
    assert rows.new() == (False, [])
    file.write_text('{"train/step": 0}\n{"train/step": 1}\n')
    assert rows.new() == (False, [{"train/step": 1}])


def test_only_what_was_appended_is_read_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"train/step": 0}\n{"train/step": 1}\n')
    rows = Rows(file)
    rows.new()
    with file.open("r+") as stream:  # nobody looks there any more
        stream.write("x" * 10)
    with file.open("a") as stream:
        stream.write('{"train/step": 2}\n')
    assert rows.new() == (False, [{"train/step": 2}])


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_file_that_was_cut_back_is_read_anew_even_if_it_is_longer_by_now(tmp_path, after):
    file = tmp_path / "metrics.jsonl"
    first = [{"train/step": n, "time/step_s": n / 7} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in first))
    rows = Rows(file)
    assert rows.new() == (False, first)
    again = first[:3] + [{"train/step": 3 + n, "time/step_s": n / 9} for n in range(after)]
    file.write_text("".join(json.dumps(row) + "\n" for row in again))
    assert rows.new() == (True, again)


@pytest.mark.parametrize("line", ["{", "[]", "{}", "null", '{"train/step": "x"}'])
def test_a_damaged_row_is_one_line_with_file_and_number(run, line):
    run.update()
    run.write("metrics.jsonl", run.rows() + line + "\n")
    with pytest.raises(ListopdError, match=r"mine/metrics\.jsonl: line 2: no row of metrics$"):
        looked_at(run)


def test_time_left_counts_the_updates_and_evaluations_to_come(run):
    run.update(26)  # 0 … 25
    # The start, and two evaluations of three: 30 s over 3 occasions.
    assert looked_at(run).evaluation_s == pytest.approx((START_S + 2 * EVALUATION_S) / 3)
    assert looked_at(run).left_s == pytest.approx(15 * STEP_S + 2 * 10.0)
    assert looked_at(run, later=3.0).left_s == pytest.approx(15 * STEP_S + 2 * 10.0 - 3)
    run.update(15)
    assert looked_at(run).left_s == 0


def test_the_last_update_is_evaluated_even_where_none_is_due_then(tmp_path):
    run = FakeRun(tmp_path / "x", evaluation=EvaluationConfig(every=15))
    run.update(31)
    left = looked_at(run).left_s
    assert left == pytest.approx(10 * STEP_S + looked_at(run).evaluation_s)
    run = FakeRun(tmp_path / "y", evaluation=EvaluationConfig(every=0))
    run.update(31)
    assert looked_at(run).left_s == pytest.approx(10 * STEP_S + looked_at(run).evaluation_s)


def test_recent_updates_say_what_those_to_come_take(run):
    run.update(11)
    rows = [json.loads(line) for line in run.rows().splitlines()]
    rows += [{"train/step": n, "time/step_s": 0.5} for n in range(11, 31)]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    view = looked_at(run)
    assert view.left_s == pytest.approx(10 * 0.5 + view.evaluation_s)


def test_of_a_run_that_was_continued_evaluations_count_once_one_is_seen(run):
    run.update(16)
    run.now += 10_000  # nobody ran it
    run.write("config.yaml", dump_config(run.config))
    begun = run.now
    run.update(2)
    view = looked_at(run)
    assert view.elapsed_s == pytest.approx(run.now - begun)
    assert view.left_s == pytest.approx(23 * STEP_S)
    run.update(4)
    view.look()
    assert view.left_s == pytest.approx(19 * STEP_S + 2 * EVALUATION_S)


def test_a_roll_back_is_followed_and_what_was_lost_is_no_evaluation(run):
    run.update(26)
    view = RunView(run.directory, lambda: run.now)
    view.look()
    assert (view.step, list(view.parse)[-1]) == (25, 25 / 40)
    run.write("metrics.jsonl", "".join(run.rows().splitlines(keepends=True)[:16]))
    run.step = 15
    view.look()
    assert (view.step, len(view.parse)) == (15, 15)
    run.update(6)
    view.look()
    assert view.left_s == pytest.approx(19 * STEP_S + 2 * EVALUATION_S)


def test_a_run_is_running_silent_interrupted_or_finished(run):
    run.update(3)
    assert looked_at(run).state == "running"  # elsewhere: nobody here holds its lock
    assert looked_at(run, later=240).state == "interrupted"
    with lock_directory(run.directory):
        assert looked_at(run).state == "running"
        view = looked_at(run, later=240)
        assert view.state == "silent"
        assert "silent: no update for 4 min" in shown(view)
    view.look()
    assert view.state == "interrupted"
    run.finish()
    assert looked_at(run, later=240).state == "finished"


def test_a_lock_that_was_seen_and_is_free_is_an_interruption_at_once(run):
    run.update(3)
    with lock_directory(run.directory):
        view = looked_at(run)
    view.look()
    assert view.state == "interrupted"


def test_slow_updates_are_not_silence(run):
    rows = [{"train/step": 0}, {"train/step": 1, "time/step_s": 100.0}]
    run.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert looked_at(run, later=450).state == "running"
    assert looked_at(run, later=550).state == "interrupted"


def test_a_run_shows_what_matters_within_80_columns(run):
    run.update(21)
    event = {"step": 12, "action": "warn", "reason": "training parses 0.1", "lam": 1.3}
    run.write("events.jsonl", json.dumps(event) + "\n")
    text = shown(looked_at(run))
    assert "mine: running\nλ = 1.3, c = 2, seed 0, 40 updates of 64 samples\n" in text
    assert "update 20 of 40, 01:10, 01:00 left" in text
    assert "strict parse  0.500  ▁▁▁▁▂▂▂▂▂▃▃▃▃▃▄▄▄▄▄▅" in text
    assert "λ             1.3, λ* 1.334, headroom +0.034" in text
    assert "0.500 at update 20" in text
    assert "update 12: training parses 0.1; warn" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_curves_heights_are_eighths():
    assert sparkline([0.0, 0.124, 0.126, 0.5, 0.99, 1.0]) == "▁▁▂▅██"


def test_without_a_terminal_a_change_is_a_plain_line_and_the_end_ends_it(run, capsys):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            run.update(40)
        if len(looks) == 4:
            run.finish()

    run.update()
    watch(str(run.directory), WatchConfig(every_s=0.5), lambda: run.now, sleep)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "mine: running, update 0/40, held-out 0.500",
        "mine: running, update 40/40, parse 1.00, held-out 0.500, 00:00 left",
        "mine: finished, update 40/40, parse 1.00, held-out 0.500",
    ]
    assert looks == [0.5] * 4


def make_search(tmp_path, **search):
    section = SearchSection(**{"seeds": [0, 1], "slots": 2, **search})
    config = SearchConfig(name="search", out=str(tmp_path), num_steps=40, search=section)
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "config.yaml").write_text(dump_config(config))
    os.utime(tmp_path / "search" / "config.yaml", (BEGUN, BEGUN))
    return tmp_path / "search"


def test_a_grid_counts_its_trials_and_ends_with_the_last(tmp_path):
    space = {"lam": {"grid_search": [1.0, 1.5]}, "seed": {"grid_search": [0, 1]}}
    directory = make_search(tmp_path, algorithm="grid", space=space, num_samples=1)
    first, second = (FakeRun(directory / "trials" / f"lam1-seed{n}", seed=n) for n in (0, 1))
    first.update(41)
    first.finish()
    second.now += 60
    second.update(21)
    row = {"name": "lam = 1, seed = 0", "updates": 40, "finished": True}
    (directory / "trials.jsonl").write_text(json.dumps(row) + "\n")
    view = open_view(directory, lambda: second.now)
    assert isinstance(view, JobView)
    view.look()
    assert (view.done, view.total, view.state) == (1, 4, "running")
    seconds = START_S + 40 * STEP_S + 4 * EVALUATION_S
    assert view.left_s == pytest.approx((view.trials["lam1-seed1"].left_s + 2 * seconds) / 2)
    text = shown(view)
    assert "trial 1 of 4" in text
    assert text.index("lam1-seed1") < text.index("lam1-seed0"), "what runs comes first"
    assert "20/40" in text and "0.750" in text
    (directory / "trials.jsonl").write_text((json.dumps(row) + "\n") * 4)
    view.look()
    assert view.state == "finished"
    assert "and 1 more" in shown(view, height=10)


def test_a_bracket_shows_the_interval_so_far_and_what_has_collapsed(tmp_path):
    directory = make_search(tmp_path)
    trial = FakeRun(directory / "trials" / "lam1.5-seed1", lam=1.5, seed=1)
    trial.update(21)
    outcomes = [
        dict(lam=1.0, seed=0, kind="finished", parsed=400, sampled=512, step=40, updates=40),
        dict(lam=1.0, seed=1, kind="finished", parsed=400, sampled=512, step=40, updates=40),
        dict(lam=1.5, seed=0, kind="collapsed", parsed=0, sampled=64, step=20, updates=20),
        dict(lam=1.5, seed=1, kind="collapsed", parsed=0, sampled=64, step=20, updates=20),
    ]
    state = {"asked": [1.5], "trials": outcomes, "failed": []}
    (directory / "search.json").write_text(json.dumps(state))
    prediction = {"lambda_star": 1.3, "lambda_star_low": 1.25, "lambda_star_high": 1.35}
    (directory / "prediction.json").write_text(json.dumps(prediction))
    view = open_view(directory, lambda: trial.now)
    view.look()
    assert view.states == {"lam1.5-seed1": "stopped"}
    assert "onset in (1, 1.5], 120 updates spent, predicted λ* 1.300" in shown(view)
    (directory / "bracket.json").write_text("{}")
    view.look()
    assert summary_line(view) == "search: finished, 1 stopped"


def test_a_study_counts_shared_trials_and_ends_with_its_last_report(tmp_path):
    curves = {"a": Curve(lams=[1.0, 1.5]), "b": Curve(judge=True, points=3)}
    section = StudySection(seeds=[0, 1], curves=curves)
    config = StudyConfig(name="study", out=str(tmp_path), study=section)
    directory = tmp_path / "study"
    trial = FakeRun(directory / "trials" / "a-lam1-s0", lam=1.0)
    (directory / "config.yaml").write_text(dump_config(config))
    trial.update(41)
    trial.finish()
    view = open_view(directory, lambda: trial.now)
    view.look()
    assert (view.done, view.total) == (1, 2 * 2 + 4 * 2)
    (directory / "predictions").mkdir()
    plan = {"plan": {"lams": [1.0, 1.2], "seeds": [0, 1]}}
    (directory / "predictions" / "b.json").write_text(json.dumps(plan))
    rows = [("a", lam, seed) for lam in (1.0, 1.5) for seed in (0, 1)]
    rows += [("b", lam, seed) for lam in (1.0, 1.2) for seed in (0, 1)]
    lines = [json.dumps(dict(zip(("curve", "lam", "seed"), r, strict=True))) for r in rows]
    (directory / "trials.jsonl").write_text("\n".join(lines[:7]) + "\n")
    view.look()
    assert (view.done, view.total, view.state) == (7, 8, "running")
    (directory / "trials.jsonl").write_text("\n".join(lines) + "\n")
    view.look()
    assert view.state == "finished"


def test_a_damaged_file_of_a_job_is_one_line(tmp_path):
    directory = make_search(tmp_path)
    (directory / "search.json").write_text("{}")
    (directory / "prediction.json").write_text("{}")
    with pytest.raises(ListopdError, match=r"search\.json: not the state of a search$"):
        open_view(directory).look()
    trial = FakeRun(directory / "trials" / "lam1-seed0")
    trial.write("summary.json", "[]")
    with pytest.raises(ListopdError, match=r"lam1-seed0/summary\.json: not what a run writes$"):
        open_view(directory).look()


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ListopdError, match=r"nowhere: no such directory$"):
        open_view(tmp_path / "nowhere")
    with pytest.raises(ListopdError, match=r"no config\.yaml$"):
        open_view(tmp_path)
    (tmp_path / "config.yaml").write_text("lam: [1\n")
    with pytest.raises(ListopdError, match=r"config\.yaml: "):
        open_view(tmp_path)
    with pytest.raises(ListopdError, match=r"every_s: must be finite and > 0"):
        watch(str(tmp_path), WatchConfig(every_s=0.0))


def test_the_command_prints_the_state_once_without_control_codes(run):
    run.update(21)
    run.finish()
    command = [sys.executable, "-m", "listopd_ray", "watch", str(run.directory)]
    once = subprocess.run([*command, "once=true"], capture_output=True, text=True)
    assert once.returncode == 0 and once.stderr == ""
    assert "update 20 of 40" in once.stdout and "\x1b" not in once.stdout
    followed = subprocess.run(command, capture_output=True, text=True)
    assert followed.stdout == "mine: finished, update 20/40, parse 0.50, held-out 0.500\n"
