"""The search as its users run it: with made-up trials in Tune, and once with real ones."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray import cloudpickle, tune

from listopd_ray import tracking
from listopd_ray.calibrate import read_onset
from listopd_ray.config import (
    AlarmConfig,
    EvaluationConfig,
    GovernorConfig,
    Schedule,
    run_directory,
)
from listopd_ray.job_config import CalibrateConfig, SearchConfig, SearchSection
from listopd_ray.search import search as search_module
from listopd_ray.search import tuning
from listopd_ray.search.search import search_job
from listopd_ray.search.tuning import trial_config
from listopd_ray.slots import SlotKeeper
from listopd_ray.types import ListopdError

NUM_STEPS = 8
ONSETS = {0: 1.27, 1: 1.33, 2: 1.41}  # of the seeds: the mean breaks at 1.33


def made_up_trial(values, *, config, keeper):
    """In the place of `distil_trial`: what parses is a function of λ and seed.

    `notes` is a directory in which a trial may leave a file.
    """
    run = trial_config(config, values)
    notes = Path(config.out).parent.parent / "notes"
    name = f"{values['lam']:g}-{values['seed']}"
    with (notes / "started").open("a") as stream:
        stream.write(f"{name}\n")
    share = 0.8 / (1 + math.exp(min(50.0, (values["lam"] - ONSETS[values["seed"]]) / 0.01)))
    broken = notes / f"break-{name}"
    for step in range(NUM_STEPS + 1):
        time.sleep(0.005)
        if broken.exists() and step == 2:
            how = broken.read_text()
            broken.unlink()
            if how == "raise":
                raise ListopdError("the disk is full")
            if how == "nan":
                share = math.nan
        tune.report({"train/step": step, **({"contract/parse_rate": share} if step else {})})
    (run_directory(run) / "student").mkdir(parents=True, exist_ok=True)
    counts = {"parsed": share * 1000, "sampled": 1000, "train/step": NUM_STEPS}
    tune.report({"finished": True, "contract/parse_rate": share, **counts})


class MadeUpSlots:
    def __init__(self, config, num_slots):
        self.keeper = ray.remote(SlotKeeper).options(num_cpus=0).remote(num_slots)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        ray.kill(self.keeper)


@pytest.fixture(scope="module")
def made_up(ray_cluster, tmp_path_factory):
    """A function that makes a search's configuration; its trials are made up."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    top = tmp_path_factory.mktemp("made-up")

    def make(name, lambda_star=1.8, **settings):
        root = top / name
        (root / "notes").mkdir(parents=True, exist_ok=True)
        file = root / "prediction.json"
        file.write_text(json.dumps({"kind": "apriori", "lambda_star": lambda_star, "clip": 2.0}))
        options = dict(seeds=[0, 1, 2], resolution=0.05, max_lam=2.5, rung=4, patience=2)
        return SearchConfig(
            name=name,
            out=str(root),
            prediction=str(file),
            num_steps=NUM_STEPS,
            search=SearchSection(**(options | settings)),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "distil_trial", made_up_trial)
        patch.setattr(search_module, "Slots", MadeUpSlots)
        patch.setattr(search_module, "_warm_starts", lambda config, run: {"data": "d"})
        patch.setattr(search_module, "data_directory", lambda config: top)
        yield make


@pytest.fixture(scope="module")
def whole(made_up):
    """A search that was run without interruption."""
    config = made_up("whole")
    search_job(config)
    return config


def outcome(config):
    return json.loads((run_directory(config) / "bracket.json").read_text())


def started(config):
    return (Path(config.out) / "notes" / "started").read_text().split()


def test_the_bracket_holds_what_is_promised_and_calibrates_later_predictions(whole):
    result, directory = outcome(whole), run_directory(whole)
    assert (result["low"], result["high"]) == (1.3, 1.35)
    assert result["confidence"] > 0.99
    assert result["floor"] == pytest.approx(0.4, abs=0.001)
    assert (result["clip"], result["num_steps"]) == (2.0, NUM_STEPS)
    assert result["prediction"]["kind"] == "apriori"
    assert result["inside"] is False
    assert result["recommended"] == pytest.approx(1.24)
    assert result["hashes"] == {"data": "d"}
    lams = [row["lam"] for row in result["verdicts"]]
    assert lams[0] == 1.8
    assert {row["verdict"] for row in result["verdicts"]} == {"holds", "breaks"}
    assert all(row["full_budget"] for row in result["verdicts"] if row["lam"] in (1.3, 1.35))
    for trial in result["trials"]:
        # Stopped where the rung and two updates below the threshold allow it, else at the end.
        assert trial["budget"] == (4 if trial["verdict"] == "collapsed" else NUM_STEPS)
    assert any(trial["verdict"] == "collapsed" for trial in result["trials"])
    assert sum(trial["updates"] for trial in result["trials"]) == result["updates"]
    assert (directory / "student").is_dir()
    assert (directory / "bracket.svg").read_text().startswith("<?xml")
    source = str(directory / "bracket.json")
    calibrate = CalibrateConfig(from_=source, clip=5.0, num_steps=NUM_STEPS)
    assert read_onset(calibrate)["high"] == 1.35
    # Once each, and a second time where an early stop was not enough.
    resumed = sum(trial["updates"] > NUM_STEPS for trial in result["trials"])
    assert len(started(whole)) == len(result["trials"]) + resumed


def test_an_interrupted_search_goes_on_to_the_same_bracket(made_up, whole, stop_search):
    interrupted = made_up("interrupted")
    stop_search(8)
    with pytest.raises(KeyboardInterrupt):
        search_job(interrupted)
    assert not (run_directory(interrupted) / "bracket.json").exists()
    stop_search()
    search_job(interrupted)
    results = [outcome(config) for config in (whole, interrupted)]
    for key in ("low", "high", "confidence", "recommended", "verdicts"):
        assert results[0][key] == results[1][key]
    before = started(interrupted)
    search_job(interrupted)  # finished: nothing is run
    assert started(interrupted) == before
    assert outcome(interrupted) == results[1]


def test_a_trial_that_fails_is_run_again_and_is_no_verdict(made_up, whole, capsys):
    config = made_up("failing")
    for name, how in (("1-1", "raise"), ("1.3-0", "nan")):
        (Path(config.out) / "notes" / f"break-{name}").write_text(how)
    search_job(config)
    for key in ("low", "high", "confidence", "verdicts"):
        assert outcome(config)[key] == outcome(whole)[key]
    assert [started(config).count(name) for name in ("1-1", "1.3-0", "1-0")] == [2, 2, 1]
    assert "λ = 1, seed 1: failed: the disk is full" in capsys.readouterr().err


def test_a_trial_that_always_fails_ends_the_search_with_one_line(made_up, monkeypatch):
    def fail(values, *, config, keeper):
        raise ListopdError("the disk is full")

    config = made_up("hopeless", attempts=2, **SMALL)
    monkeypatch.setattr(tuning, "distil_trial", fail)
    with pytest.raises(ListopdError, match="the disk is full; given up after 2 attempts"):
        search_job(config)
    assert not (run_directory(config) / "bracket.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 9}, r"begun with another configuration: num_steps \(8 → 9\)"),
        ({"search": SearchSection(seeds=[0, 1])}, "begun with another configuration"),
    ],
)
def test_another_configuration_under_the_same_name_is_refused(whole, changes, message):
    before = outcome(whole)
    with pytest.raises(ListopdError, match=message):
        search_job(replace(whole, **changes))
    assert outcome(whole) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(seeds=[]), "search.seeds: give at least one"),
        (dict(seeds=[1, 1]), "each once"),
        (dict(slots=0), "search.slots: must be ≥ 1"),
        (dict(resolution=0.0), "search.resolution: must be finite and ≥ 0.0001"),
        (dict(max_lam=1.01), "search.max_lam: must be finite and at least"),
        (dict(error=0.5), "search.error: must lie in"),
        (dict(space={"lr": {"uniform": [1, 2]}}), "search.space: needs search.algorithm"),
        (dict(algorithm="grid"), "search.space: search.algorithm=grid needs one"),
        (dict(algorithm="grid", space={"lrr": {"grid_search": [1]}}), "search.space.lrr"),
        (dict(algorithm="grid", space={"lr": [1, 2]}), "search.space.lr: give one of"),
        (dict(algorithm="grid", space={"clip": {"grid_search": [0.5]}}), "clip: c must be > 1"),
        (dict(algorithm="grid", space={"student.path": {"choice": ["x"]}}), "trials share it"),
        (dict(algorithm="grid", space={"lr": {"uniform": [1]}}), "search.space.lr.uniform"),
        (dict(algorithm="optuna", space={"lr": {"grid_search": [1]}}), "optuna takes choice"),
        (dict(algorithm="grid", space={"seed": {"randint": [0, 9]}}), "search.space.seed"),
        (dict(algorithm="grid", space={"lr": {"uniform": [2, 1]}}), "give low, high, not"),
        (dict(algorithm="grid", space={"lr": {"quniform": [1, 2, 0]}}), "and a step > 0, not"),
        (dict(algorithm="grid", space={"lr": {"uniform": [1, math.inf]}}), "give low, high, not"),
        (dict(algorithm="grid", space={"num_prompts": {"uniform": [10, 20]}}), "num_prompts: "),
        (dict(seeds=[1 << 63]), "seed: must be <"),
        (dict(algorithm="grid", space={"clip": {"uniform": [0, 3]}}), "clip: c must be > 1"),
        (dict(algorithm="grid", space={"lam": {"grid_search": [1, 1]}}), "give every value once"),
        (dict(algorithm="grid", space={"learner.dtype": {"choice": ["x"]}}), "trials share it"),
        (dict(algorithm="grid", space={"lam": {"grid_search": [1]}}, num_samples=2), "the same"),
        (dict(algorithm="optuna", space={"lr": {"uniform": [1, 2]}}), "evaluation.every"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(made_up, settings, message):
    config = made_up("bad", **settings)
    if "algorithm" in settings:
        config = replace(config, prediction=None)
    if "evaluation.every" in message:
        config = replace(config, evaluation=EvaluationConfig(every=0))
    with pytest.raises(ListopdError, match=message):
        search_job(config)
    assert not run_directory(config).exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"governor": GovernorConfig(enabled=True)},
        {"alarm": AlarmConfig(action="rollback")},
        {"lam": "auto"},
        {"lam_schedule": Schedule(kind="linear", final=1.0)},
    ],
)
def test_what_moves_lam_during_a_trial_is_refused(made_up, changes):
    config = replace(made_up("moving"), **changes)
    with pytest.raises(ListopdError, match="the search is to judge the λ that it sets"):
        search_job(config)
    assert not run_directory(config).exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"lambda_star": 1.3}',
        '{"lambda_star": 1.3, "clip": 5.0}',
        '{"lambda_star": true, "clip": 2.0}',
        '{"lambda_star": 1e308, "clip": 2.0}',
        '{"lambda_star": 0.5, "clip": 2.0}',
        '{"lambda_star": 1.3, "clip": 2.0, "lambda_star_low": "a"}',
        '{"lambda_star": 1.3, "clip": 2.0, "lambda_star_low": -4}',
        '{"lambda_star": 1.3, "clip": 2.0, "lambda_star_low": 1.4}',
        '{"lambda_star": 1.3, "clip": 2.0, "lambda_star_high": Infinity}',
        '{"lambda_star": 1.3, "clip": 2.0, "lambda_star_low": NaN}',
        '{"lambda_star": 1.3, "clip": 2.0, "hashes": {"data": 3}}',
        '{"lambda_star": 1.3, "clip": 2.0, "hashes": {"data": ["another"]}}',
    ],
)
def test_a_prediction_that_makes_no_sense_is_refused_before_anything_is_written(made_up, content):
    config = made_up("senseless")
    assert config.prediction is not None
    Path(config.prediction).write_text(content)
    with pytest.raises(ListopdError, match=r"prediction\.json"):
        search_job(config)
    assert not run_directory(config).exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        '{"asked": [], "trials": [{}], "failed": [], "seconds": 0, "hashes": {}}',
        '{"asked": [NaN], "trials": [], "failed": [], "seconds": 0, "hashes": {}, "slots": {}}',
    ],
)
def test_a_damaged_state_is_refused_and_kept(made_up, content):
    config = made_up("damaged")
    run_directory(config).mkdir(exist_ok=True)
    file = run_directory(config) / "search.json"
    file.write_text(content)
    with pytest.raises(ListopdError, match=r"search\.json: not"):
        search_job(config)
    assert file.read_text() == content


SMALL = dict(lambda_star=1.3, seeds=[0], resolution=0.3, max_lam=1.9)


def test_a_prediction_that_is_refused_leaves_the_name_free(made_up):
    config = made_up("free", **SMALL)
    file = Path(config.prediction)
    good = file.read_text()
    file.write_text('{"lambda_star": 1.3, "clip": 2.0, "hashes": {"data": ["another"]}}')
    with pytest.raises(ListopdError, match="was made for another data"):
        search_job(config)
    assert not run_directory(config).exists()
    file.write_text(good)
    search_job(replace(config, prediction=str(file)))
    assert outcome(config)["low"] < ONSETS[0] < outcome(config)["high"]


def test_the_student_outlives_the_trials(made_up):
    config = made_up("outlives", **SMALL)
    search_job(config)
    shutil.rmtree(run_directory(config) / "trials")
    search_job(config)
    assert (run_directory(config) / "student").is_dir()
    shutil.rmtree(run_directory(config) / "student")
    with pytest.raises(ListopdError, match="the recommended student is gone"):
        search_job(config)


def test_two_searches_never_write_one_directory(made_up, monkeypatch):
    config = made_up("locked")
    monkeypatch.setattr(tracking, "LOCK_WAIT_S", 0.1)
    run_directory(config).mkdir()
    with (
        tracking.lock_directory(run_directory(config)),
        pytest.raises(ListopdError, match="another process is writing here"),
    ):
        search_job(config)
    assert not (run_directory(config) / "config.yaml").exists()


def test_too_little_parsed_at_lam_one_ends_the_search_with_one_line(made_up, monkeypatch):
    def barely(values, *, config, keeper):
        counts = {"parsed": 2, "sampled": 1000, "train/step": NUM_STEPS}
        tune.report({"finished": True, "contract/parse_rate": 0.002, **counts})

    config = made_up("blind")
    monkeypatch.setattr(tuning, "distil_trial", barely)
    with pytest.raises(ListopdError, match=r"strict parse at λ = 1 is 0\.0020"):
        search_job(config)
    assert not (run_directory(config) / "bracket.json").exists()
