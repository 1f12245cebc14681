"""The search as its users run it: with made-up trials in Tune, and once with real ones."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import cloudpickle, tune

from listopd_ray.calibrate import read_onset
from listopd_ray.config import Config, run_directory, with_values
from listopd_ray.job_config import CalibrateConfig, SearchConfig, SearchSection
from listopd_ray.search import search as search_module
from listopd_ray.search import tuning
from listopd_ray.search.search import search_job
from listopd_ray.search.tuning import trial_config
from listopd_ray.slots import Lease, SlotKeeper, Slots, prepared_for
from listopd_ray.types import ListopdError

NUM_STEPS = 12
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


@pytest.fixture
def stop_after(monkeypatch):
    """A function: Ctrl-C after so many trials; none: no more."""
    show = search_module.Display.show

    def arrange(number=None):
        left = [number]

        def show_and_stop(self, event, result):
            show(self, event, result)
            if left[0] is not None and event == "complete":
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt

        monkeypatch.setattr(search_module.Display, "show", show_and_stop)

    return arrange


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


def test_an_interrupted_search_goes_on_to_the_same_bracket(made_up, whole, stop_after):
    interrupted = made_up("interrupted")
    for number in (5, 6):
        stop_after(number)
        with pytest.raises(KeyboardInterrupt):
            search_job(interrupted)
        assert not (run_directory(interrupted) / "bracket.json").exists()
    stop_after()
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

    config = made_up("hopeless", attempts=2)
    monkeypatch.setattr(tuning, "distil_trial", fail)
    with pytest.raises(ListopdError, match="the disk is full; given up after 2 attempts"):
        search_job(config)
    assert not (run_directory(config) / "bracket.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 13}, r"begun with another configuration: num_steps \(12 → 13\)"),
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
        (dict(resolution=0.0), "search.resolution: must be finite and > 0"),
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
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(made_up, settings, message):
    config = made_up("bad", **settings)
    with pytest.raises(ListopdError, match=message):
        search_job(config)
    assert not run_directory(config).exists()


@pytest.fixture(scope="module")
def shared_slots(ray_cluster: None, config: Config) -> Iterator[Slots]:
    with Slots(config, 2) as slots:
        yield slots


@pytest.fixture
def use_shared_slots(shared_slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches use engines that are there already, and leave them."""
    shared = contextlib.nullcontext(shared_slots)
    monkeypatch.setattr(search_module, "Slots", lambda config, number: shared)


def real_search(config: Config, name: str, **settings) -> SearchConfig:
    plain = with_values(config, {"name": name, "num_steps": 3, "evaluation.every": 0})
    return SearchConfig(**vars(plain), search=SearchSection(**settings))


def test_real_trials_are_searched_interrupted_and_continued(
    ray_cluster: None, config: Config, stop_after, request: pytest.FixtureRequest
) -> None:
    settings = dict(seeds=[0, 1], resolution=0.1, max_lam=1.2, error=0.4)
    interrupted = real_search(config, "interrupted", **settings)
    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        search_job(interrupted)
    stop_after()
    request.getfixturevalue("use_shared_slots")
    search_job(interrupted)
    whole = real_search(config, "whole", **settings)
    search_job(whole)
    result, again = outcome(whole), outcome(interrupted)
    for key in ("low", "high", "confidence", "verdicts", "floor", "recommended"):
        assert again[key] == result[key]  # λ sequence and every count
    assert result["prediction"]["kind"] == "apriori"
    slots = again["slots"]
    assert np.median(slots["reused"]) < min(slots["built"]) / 10
    model = json.loads((run_directory(whole) / "student" / "config.json").read_text())
    assert model["model_type"] == "qwen3"


def test_grids_and_optuna_run_the_same_trials_over_any_key(
    config: Config, use_shared_slots: None, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"lr": {"grid_search": [1e-3, 3e-3]}, "group_size": {"choice": [2]}}
    grid = real_search(config, "grid", algorithm="grid", space=space)
    search_job(grid)
    file = run_directory(grid) / "trials.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["lr"] for row in rows) == [1e-3, 3e-3]
    assert all(row["finished"] and row["updates"] == 3 for row in rows)
    assert all(0 <= row["eval/ndcg_at_k_all"] <= 1 for row in rows)
    run = next((run_directory(grid) / "trials").glob("*lr0.001*"))
    assert "group_size: 2" in (run / "config.yaml").read_text()
    before = (run / "metrics.jsonl").read_text()
    search_job(grid)  # all are finished
    assert (run / "metrics.jsonl").read_text() == before

    space = {"clip": {"uniform": [1.5, 3.0]}}
    options = dict(algorithm="optuna", asha=True, rung=1, space=space)
    optuna = real_search(config, "optuna", num_samples=2, **options)
    search_job(optuna)
    file = run_directory(optuna) / "trials.jsonl"
    clips = {json.loads(line)["clip"] for line in file.read_text().splitlines()}
    assert len(clips) == 2
    search_job(real_search(config, "optuna", num_samples=3, **options))  # one more
    again = {json.loads(line)["clip"] for line in file.read_text().splitlines()}
    assert clips < again
    assert len(again) == 3
    assert "best first" in capsys.readouterr().out


def test_a_slot_whose_engine_died_is_rebuilt(ray_cluster: None, config: Config) -> None:
    prepared = prepared_for(config)
    with Slots(config, 1) as slots:

        def lease(holder: str) -> Lease:
            return ray.get(slots.keeper.lease.remote(config, prepared.cluster_arguments(), holder))

        def give_back(holder: str, *, sound: bool) -> None:
            ray.get(slots.keeper.release.remote(holder, sound=sound))

        first = lease("a")
        give_back("a", sound=True)
        again = lease("b")
        assert again.workers._actors == first.workers._actors
        ray.kill(again.workers._actors[0])
        give_back("b", sound=True)
        rebuilt = lease("c")
        assert rebuilt.workers._actors != first.workers._actors
        learner = rebuilt.start_learner(config, prepared.student_path, prepared.canary_ids)
        assert rebuilt.workers.load_weights(learner.publish_weights()) < 1e-4
        give_back("c", sound=False)  # its trial failed: the engines may be poisoned
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(rebuilt.workers._actors[0].__ray_ready__.remote())
