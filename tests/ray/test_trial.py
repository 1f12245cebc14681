"""What a trial of a search reports to Tune."""

import json

import pytest

from listopd_ray import job
from listopd_ray.config import Config, run_directory
from listopd_ray.job_config import SearchSection
from listopd_ray.search import tuning
from listopd_ray.search.tuning import (
    AGAIN,
    PARSE_RATE,
    TO_THE_END,
    CollapseStopper,
    distil_trial,
    trial_config,
)
from listopd_ray.types import ListopdError

VALUES = {"lam": 1.4, "seed": 3, TO_THE_END: False}
COLLAPSES_AT, STOPS_AT = 57, 61  # five updates in a row below
NUM_STEPS = 120


def row(step):
    return {"train/step": step, PARSE_RATE: 0.0 if step >= COLLAPSES_AT else 0.7}


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """A function that runs the trial until the stopper has enough; its reports."""
    config = Config(out=str(tmp_path), num_steps=NUM_STEPS)
    directory = run_directory(trial_config(config, VALUES))

    class Stopped(Exception):  # noqa: N818
        pass

    def run(from_step, crash_at=None):
        """The loop goes on from `from_step`; what it logged before lies there."""
        stopper, reports = CollapseStopper(SearchSection(), NUM_STEPS), []

        def report(result):
            reports.append(result)
            if stopper("id", result | {"config": VALUES}):
                raise Stopped

        def distill(config, prepared, lease, report):
            for step in range(from_step + 1, NUM_STEPS + 1):
                if step == crash_at:
                    raise Stopped
                with (directory / "metrics.jsonl").open("a") as stream:
                    stream.write(json.dumps(row(step)) + "\n")
                report(row(step))

        class Keeper:
            class lease:  # noqa: N801
                @staticmethod
                def remote(*_):
                    return None

        class Prepared:
            def cluster_arguments(self):
                return {}

        class Context:
            def get_trial_id(self):
                return "id"

        directory.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(tuning.tune, "report", report)
        monkeypatch.setattr(tuning.tune, "get_context", Context)
        monkeypatch.setattr(tuning.ray, "get", lambda reference: reference)
        monkeypatch.setattr(tuning, "prepared_for", lambda run: Prepared())
        monkeypatch.setattr(job, "distill", distill)
        with pytest.raises(Stopped):
            distil_trial(VALUES, config=config, keeper=Keeper)
        return reports

    run.directory = directory
    return run


def test_an_interrupted_trial_is_stopped_where_an_uninterrupted_one_is(trial):
    assert trial(0)[-1]["train/step"] == STOPS_AT
    for crash_at in (30, 58, 61):
        (trial.directory / "metrics.jsonl").unlink()
        before = trial(0, crash_at=crash_at)
        reports = trial(crash_at // 20 * 20)
        assert reports[-1]["train/step"] == STOPS_AT
        again = [r["train/step"] for r in reports if AGAIN in r]
        assert again == [r["train/step"] for r in before]  # reported, and not counted twice


def test_counts_that_are_no_number_are_an_error_with_its_place(trial, tmp_path):
    summary = {"student": {"parse_rate": float("nan"), "num_prompts": 8}, "num_steps": 4}
    trial.directory.mkdir()
    (trial.directory / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ListopdError, match=r"summary\.json: strict parse is nan"):
        distil_trial(VALUES, config=Config(out=str(tmp_path)), keeper=None)


def test_values_that_differ_have_names_that_differ():
    values = [0.1, 0.10000001, 1e-3, 1, 1.24, 2.0]
    names = [trial_config(Config(), {"lr": value}).name for value in values]
    assert len(set(names)) == len(values)
    assert (names[0], names[4]) == ("lr0.1", "lr1.24")
