"""The study's bookkeeping, with slots that make up their trials; one test runs it for real."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from listopd_ray import study as study_module
from listopd_ray.calibrate import Measured
from listopd_ray.cliff.calibration import FIRST_ID, UNUSED_ID, Masses
from listopd_ray.cliff.threshold import lambda_star
from listopd_ray.config import Config, dump_config, run_directory
from listopd_ray.job_config import Curve, StudyConfig, StudySection
from listopd_ray.prepare import Prepared
from listopd_ray.study import grid, study_job
from listopd_ray.types import ListopdError

STRUCTURE = (0.99, 0.95)
EVALUATION = {"parse_rate": 0.4, "ndcg_at_1": 0.5, "ndcg_at_1_interval": [0.45, 0.55]}
TEACHER = {"parse_rate": 0.8, "ndcg_at_1": 0.9, "ndcg_at_1_interval": [0.88, 0.92]}


class FakeSlots:
    """Trials break above λ = 1 + 0.42·log c / log 2; `ran` holds the names of those run."""

    ran: list[str] = []  # noqa: RUF012 - shared on purpose: a study makes its own slots
    fail: tuple[str, ...] = ()
    stop_after = 1000

    def __init__(self, config, num_slots):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, configs):
        pairs = dict.fromkeys(("opening", "separator", "closing", UNUSED_ID), STRUCTURE)
        pairs["item_id"] = (0.767, 0.288)  # λ* = 1.331 at c = 2
        pairs[FIRST_ID] = (0.767, 0.16)
        sums = {name: np.tile([2.0, 2 * p, 2 * b], (8, 1)) for name, (p, b) in pairs.items()}
        masses = Masses(
            sums=sums,
            log_ratios=np.stack([np.arange(8.0), np.full(8, -1.1)], axis=1),
            per_output=dict.fromkeys(sums, 2),
            num_outputs=8,
        )
        hashes = {"data": "d", "warm_start": "w", "teacher": "t", "base": "w"}
        return [
            Measured(masses=masses, warm_start=EVALUATION, teacher=TEACHER, hashes=hashes)
            for _ in configs
        ]

    def run(self, configs):
        for config in configs:
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append(config.name)
            if config.name in self.fail:
                yield config, {"error": "the disk is full"}
                continue
            summary = self._summary(config)
            directory = run_directory(config)
            directory.mkdir(parents=True)
            (directory / "config.yaml").write_text(dump_config(config))
            (directory / "summary.json").write_text(json.dumps(summary))
            yield config, summary

    def _summary(self, config):
        breaks_at = 1 + 0.42 * np.log(config.clip) / np.log(2)
        rate = 0.02 if config.lam > breaks_at and config.extrapolation == "plain" else 0.7
        failing = round((1 - rate) * 100)
        reasons = ("truncated", "not_json", "extra_text", "wrong_schema", "not_a_permutation")
        return {
            "student": {
                "parse_rate": rate,
                "parse_rate_interval": [rate - 0.01, rate + 0.01],
                "ndcg_at_1": 0.6,
                "ndcg_at_k": 0.8,
                "ndcg_at_k_all": 0.8 * rate,
                "num_prompts": 100,
                "reasons": dict(zip(reasons, (failing, 0, 0, 0, 0), strict=True)),
            },
            "lam": config.lam,
            "mean_lam": config.lam,
            "clip": config.clip,
            "extrapolation": config.extrapolation,
            "num_steps": config.num_steps,
            "seed": config.seed,
            "seconds": 1.0,
            "prediction_sha256": study_module.sha256(Path(config.prediction))
            if config.prediction
            else None,
        }


@pytest.fixture
def slots(monkeypatch):
    class Slots(FakeSlots):
        ran = []  # noqa: RUF012

    monkeypatch.setattr(study_module, "Slots", Slots)
    monkeypatch.setattr(study_module, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(study_module, "warm_start", lambda config, role: None)
    return Slots


@pytest.fixture
def make_study(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()

    def make(**curves):
        base = StudyConfig(name="s", out=str(tmp_path / "runs"))
        return dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, path=str(tmp_path / "data")),
            study=StudySection(seeds=[0, 1], curves=curves),
        )

    return make


CORE = {
    "c2": Curve(set={"clip": 2.0}, judge=True),
    "c5": Curve(set={"clip": 5.0}, judge=True, calibrated_from="c2"),
}


def read_verdict(config):
    return json.loads((run_directory(config) / "verdict.json").read_text())


def test_the_grid_is_lambda_1_and_multiples_of_the_step_around_the_prediction():
    assert grid(1.331, Curve()) == [1.0, 1.2, 1.3, 1.4, 1.5, 1.6]
    assert grid(1.125, Curve(step=0.05)) == [1.0, 1.05, 1.1, 1.15, 1.2, 1.25]
    assert grid(1.02, Curve(points=2)) == [1.0, 1.1, 1.2]
    with pytest.raises(ListopdError, match="give the curve's lams"):
        grid(None, Curve())


def test_a_study_locks_predictions_runs_its_trials_and_judges(slots, make_study):
    config = make_study(**CORE)
    study_job(config)
    assert len(slots.ran) == len(set(slots.ran)) == 2 * 6 * 2
    tests = {test["name"]: test for test in read_verdict(config)["tests"]}
    kinds = [f"{curve} {kind}" for curve in CORE for kind in ("apriori", "escape", "first_id")]
    assert set(tests) == {*kinds, "c5 calibrated"}
    # Breaks above 1.42 and 1.975: at 1.5 and at 2.0.
    assert (tests["c2 apriori"]["measured_low"], tests["c2 apriori"]["measured_high"]) == (1.4, 1.5)
    assert tests["c2 apriori"]["predicted"] == pytest.approx(1.331, abs=1e-3)
    assert tests["c2 apriori"]["inside"] is False  # below 1.35
    assert tests["c5 apriori"]["inside"] is False
    first = tests["c2 first_id"]
    assert first["predicted"] == pytest.approx(lambda_star(0.767, 0.16, 2.0))
    assert first["inside"] is False
    calibrated = tests["c5 calibrated"]
    assert calibrated["predicted"] == pytest.approx(1 + 0.45 * np.log(5) / np.log(2))
    assert (calibrated["measured_low"], calibrated["measured_high"]) == (1.9, 2.0)
    assert calibrated["inside"] is True
    directory = run_directory(config)
    rows = [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for row in rows:
        file = directory / "predictions" / f"{row['curve']}.json"
        assert row["prediction_sha256"] == study_module.sha256(file)
    assert (directory / "c2.svg").stat().st_size > 1000
    assert "not_a_permutation" not in (directory / "study.md").read_text()


def test_the_prediction_is_on_disk_before_the_first_trial(slots, make_study, monkeypatch):
    config = make_study(**CORE)

    def run(self, configs):
        files = {Path(c.prediction) for c in configs}
        assert all(file.exists() for file in files)
        calibrated = [p["kind"] for f in files for p in json.loads(f.read_text())["also"]]
        assert ("calibrated" in calibrated) == ("c5" in configs[0].name)
        return FakeSlots.run(self, configs)

    monkeypatch.setattr(slots, "run", run)
    study_job(config)
    assert len(slots.ran) == 24


def test_an_interrupted_study_goes_on_where_it_stopped(slots, make_study):
    config = make_study(**CORE)
    slots.stop_after = 7
    with pytest.raises(KeyboardInterrupt):
        study_job(config)
    slots.stop_after = 1000
    study_job(config)
    assert len(slots.ran) == len(set(slots.ran)) == 24
    study_job(config)
    assert len(slots.ran) == 24


def test_a_failed_trial_leaves_the_others_and_is_repeated(slots, make_study, capsys):
    config = make_study(c2=CORE["c2"])
    slots.fail = ("c2-lam1.3-s1",)
    with pytest.raises(ListopdError, match=r"1 trials failed.*c2-lam1.3-s1\): the disk is full"):
        study_job(config)
    assert len(slots.ran) == 12
    assert read_verdict(config)["tests"] == []  # not whole
    slots.fail = ()
    study_job(config)
    assert slots.ran[12:] == ["c2-lam1.3-s1"]
    assert read_verdict(config)["tests"][0]["measured_high"] == 1.5


def test_a_prediction_made_after_its_data_is_refused(slots, make_study):
    config = make_study(**CORE)
    study_job(config)
    file = run_directory(config) / "predictions" / "c2.json"
    locked = file.read_text()
    file.unlink()
    with pytest.raises(ListopdError, match=r"c2\.json: refused: c2-lam1-s0 was begun before it"):
        study_job(config)
    assert not file.exists()
    file.write_text(locked.replace('"lambda_star": 1.33', '"lambda_star": 1.43'))
    with pytest.raises(ListopdError, match="was run under another prediction"):
        study_job(config)


def test_a_plan_that_was_changed_after_it_was_locked_is_refused(slots, make_study):
    study_job(make_study(**CORE))
    other_clip = {**CORE, "c2": Curve(set={"clip": 2.5}, judge=True)}
    thinned = {**CORE, "c2": dataclasses.replace(CORE["c2"], lams=[1.0, 1.2, 1.3, 1.5, 1.6])}
    for changed, what in (
        (make_study(**other_clip), "set"),
        (make_study(**{**CORE, "c2": dataclasses.replace(CORE["c2"], seeds=[0])}), "seeds"),
        (dataclasses.replace(make_study(**CORE), num_steps=60), "num_steps"),
        (make_study(**thinned), "lams"),
    ):
        with pytest.raises(ListopdError, match=f"locked with another {what}"):
            study_job(changed)


def test_an_unfinished_seed_makes_a_curve_incomplete(slots, make_study):
    config = make_study(**CORE)
    slots.stop_after = 6  # the first seed of the first curve
    with pytest.raises(KeyboardInterrupt):
        study_job(config)
    slots.stop_after = 1000
    only = dataclasses.replace(config.study, only=["c5"])
    with pytest.raises(ListopdError, match="c2: no onset to predict from: 6 trials are missing"):
        study_job(dataclasses.replace(config, study=only))
    assert not (run_directory(config) / "predictions" / "c5.json").exists()


def test_trials_of_another_configuration_are_never_taken(slots, make_study):
    study_job(make_study(c2=CORE["c2"]))
    plain = Curve(set={"clip": 2.0}, lams=[1.0, 1.5])
    changed = make_study(c2=CORE["c2"], plain=plain)
    only = dataclasses.replace(changed.study, only=["plain"])
    changed = dataclasses.replace(changed, lr=5e-4, study=only)
    with pytest.raises(
        ListopdError, match=r"begun with another configuration: lr \(0.001 → 0.0005"
    ):
        study_job(changed)


def test_a_trial_that_another_curve_has_run_is_no_prediction_any_more(slots, make_study):
    plain = Curve(set={"clip": 2.0}, lams=[1.0, 1.5])
    config = make_study(plain=plain, c2=CORE["c2"])
    with pytest.raises(ListopdError, match=r"c2\.json: refused: plain-lam1-s0 is the same trial"):
        study_job(config)
    assert not (run_directory(config) / "predictions" / "c2.json").exists()


def test_a_prediction_edited_later_is_seen_whatever_is_run(slots, make_study):
    config = make_study(**CORE)
    study_job(config)
    file = run_directory(config) / "predictions" / "c2.json"
    file.write_text(file.read_text().replace('"lambda_star": 1.33', '"lambda_star": 1.43'))
    only = dataclasses.replace(config.study, only=["c5"])
    with pytest.raises(ListopdError, match="is not the prediction that c2 was run under"):
        study_job(dataclasses.replace(config, study=only))


def test_an_unjudged_curve_takes_trials_from_others_and_shares_lambda_1(slots, make_study):
    bounded = Curve(set={"clip": 2.0, "extrapolation": "bounded"}, lams=[1.0, 1.5, 3.0])
    plain = Curve(set={"clip": 2.0}, lams=[1.0, 1.5, 3.0])
    config = make_study(c2=CORE["c2"], bounded=bounded, plain=plain)
    study_job(config)
    assert sorted(name for name in slots.ran if not name.startswith("c2")) == [
        "bounded-lam1.5-s0",
        "bounded-lam1.5-s1",
        "bounded-lam3-s0",
        "bounded-lam3-s1",
        "plain-lam3-s0",
        "plain-lam3-s1",
    ]
    curves = read_verdict(config)["curves"]
    assert (curves["bounded"]["low"], curves["bounded"]["high"]) == (3.0, None)
    assert (curves["plain"]["low"], curves["plain"]["high"]) == (1.0, 1.5)
    rows = (run_directory(config) / "trials.jsonl").read_text().splitlines()
    assert len([row for row in rows if json.loads(row)["curve"] == "bounded"]) == 6


def test_the_onset_of_another_study_predicts_a_curve_from_its_verdict(slots, make_study, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    onset = {"low": 1.5, "high": 1.7, "clip": 3.0, "num_steps": 120}
    other = onset | {"high": 1.9}
    elsewhere.write_text(json.dumps({"tests": [], "curves": {"c3": onset, "more": other}}))
    curve = Curve(set={"clip": 2.0}, judge=True, calibrated_from=str(elsewhere))
    with pytest.raises(ListopdError, match=r"curves\.c2\.calibrated_from: .*several onsets"):
        study_job(make_study(c2=curve))
    curve = dataclasses.replace(curve, calibrated_from=f"{elsewhere}:c3")
    config = make_study(c2=curve)
    study_job(config)
    calibrated = read_verdict(config)["tests"][-1]
    assert calibrated["name"] == "c2 calibrated"
    assert calibrated["predicted"] == pytest.approx(1 + 0.6 * np.log(2) / np.log(3))
    assert calibrated["inside"] is True  # breaks above 1.42
    assert (calibrated["teacher_mass"], calibrated["base_mass"]) == (0.767, 0.288)
    elsewhere.unlink()
    study_job(config)  # what was predicted is locked


def test_another_studys_verdict_without_a_fitting_onset_is_refused_at_once(
    slots, make_study, tmp_path
):
    elsewhere = tmp_path / "elsewhere.json"
    onset = {"low": 1.5, "high": 1.7, "clip": 3.0, "num_steps": 30}
    elsewhere.write_text(json.dumps({"tests": [], "curves": {"c3": onset}}))
    config = make_study(c2=Curve(judge=True, calibrated_from=str(elsewhere)))
    with pytest.raises(ListopdError, match=r"elsewhere\.json: no onset measured with num_steps"):
        study_job(config)
    assert not run_directory(config).exists()


def test_a_budget_prediction_starts_from_the_onset_at_another_budget(slots, make_study):
    short = Curve(set={"clip": 2.0, "num_steps": 40}, judge=True)
    long = Curve(
        set={"clip": 2.0, "num_steps": 80},
        lams=[1.0, 1.36, 1.38, 1.4, 1.42, 1.44],
        step=0.02,
        judge=True,
        budget_from="short",
    )
    config = make_study(short=short, long=long)
    study_job(config)
    tests = {test["name"]: test for test in read_verdict(config)["tests"]}
    budget, star = tests["long budget"], tests["short apriori"]["predicted"]
    assert budget["predicted"] == pytest.approx(star + (1.45 - star) / 2)
    assert (budget["measured_low"], budget["measured_high"]) == (1.42, 1.44)
    assert budget["why"].startswith("not testable: a shift of 0.060 is below 3 grid steps of 0.02")
    for kind in ("first_id", "escape"):
        other, star = tests[f"long budget_{kind}"], tests[f"short {kind}"]["predicted"]
        assert other["predicted"] == pytest.approx(star + (1.45 - star) / 2)
        assert other["inside"] is False


@pytest.mark.parametrize(
    ("curves", "error"),
    [
        ({}, "study.curves: give at least one"),
        ({"a": Curve(calibrated_from="b")}, "curves.a.calibrated_from: b: No such file"),
        ({"a": Curve(calibrated_from="a")}, "study.curves.a: 'a' is no earlier curve"),
        ({"a": Curve(budget_from="b")}, "study.curves.a: 'b' is no earlier curve"),
        ({"a": Curve(lams=[1.2, 1.3], judge=True)}, "study.curves.a.lams: must begin with 1"),
        ({"a": Curve(lams=[1.0, 1.3, 1.2])}, "study.curves.a.lams: must be finite, ≥ 0 and rise"),
        ({"a": Curve(seeds=[])}, "study.curves.a.seeds: give at least one"),
        ({"a": Curve(seeds=[0, 0])}, "study.curves.a.seeds: give at least one, each once and ≥ 0"),
        ({"a": Curve(seeds=[-1])}, "study.curves.a.seeds: give at least one, each once and ≥ 0"),
        ({"a": Curve(set={"out": "x"})}, "study.curves.a.set: out is set by the study itself"),
        ({"a": Curve(set={"clpi": 2.0})}, "Key 'clpi' not in 'Config'"),
        ({"a": Curve(set={"clip": 0.5})}, "clip: c must be > 1"),
        ({"a": Curve(step=0.0)}, "study.curves.a: step must be > 0"),
        ({"a/b": Curve()}, "study.curves.a/b: a name has letters"),
        ({"a*": Curve()}, r"study.curves.a\*: a name has letters"),
    ],
)
def test_a_mistake_in_a_curve_is_one_line_before_anything_is_written(
    slots, make_study, curves, error
):
    config = make_study(**curves)
    with pytest.raises(ListopdError, match=error):
        study_job(config)
    assert not run_directory(config).exists()
    assert slots.ran == []


def test_a_study_needs_a_slot(slots, make_study):
    config = make_study(**CORE)
    without = dataclasses.replace(config, study=dataclasses.replace(config.study, slots=0))
    with pytest.raises(ListopdError, match=r"study\.slots: must be ≥ 1, not 0"):
        study_job(without)


def test_a_real_study_measures_trains_on_one_slot_and_judges(
    ray_cluster: None, hf_config: Config, prepared: Prepared, tmp_path: Path
) -> None:
    config = hf_config
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    small = dataclasses.replace(config.evaluation, every=0)
    fields |= {"out": str(tmp_path), "name": "real", "num_steps": 2, "evaluation": small}
    fields["lr"] = 3e-4  # λ = 1 keeps the contract
    curve = Curve(set={"clip": 2.0}, lams=[1.0, 1.5], step=0.5, judge=True)
    bounded = Curve(set={"clip": 2.0, "extrapolation": "bounded"}, lams=[1.0, 1.5])
    study = StudySection(slots=1, seeds=[0], curves={"c2": curve, "bounded": bounded})
    study_job(StudyConfig(**fields, study=study))
    directory = tmp_path / "real"
    locked = json.loads((directory / "predictions" / "c2.json").read_text())
    assert locked["hashes"]["teacher"] == [prepared.hashes["teacher"]]
    assert locked["num_outputs"] == locked["num_prompts"] == config.evaluation.num_prompts
    structure = {"opening", "separator", "closing"}
    assert set(locked["classes"]) == {"item_id", *structure, UNUSED_ID, FIRST_ID}
    for row in locked["classes"].values():
        assert 0 < row["base_mass"] <= 1 and 0 < row["teacher_mass"] <= 1
    rows = [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]
    assert [(row["curve"], row["lam"], row["mean_lam"]) for row in rows] == [
        ("c2", 1.0, 1.0),
        ("c2", 1.5, 1.5),
        ("bounded", 1.0, 1.0),
        ("bounded", 1.5, 1.5),
    ]
    assert rows[0]["prediction_sha256"] == study_module.sha256(directory / "predictions/c2.json")
    # λ = 1 was taken from the other curve: three runs.
    assert len(list((directory / "trials").iterdir())) == 3
    tests = json.loads((directory / "verdict.json").read_text())["tests"]
    assert [test["name"] for test in tests] == ["c2 apriori", "c2 escape", "c2 first_id"]
