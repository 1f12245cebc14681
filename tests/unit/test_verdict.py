import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_ray.cliff.verdict import (
    budget_prediction,
    find_onset,
    judge,
    measure_onset,
    study_verdict,
)
from listopd_ray.types import ListopdError

LAMS = [1.0, 1.2, 1.3, 1.4, 1.5]


def make_trials(rates_by_seed, lams=LAMS, num_prompts=512, ndcg=0.6):
    return [
        {
            "lam": lam,
            "seed": seed,
            "parse_rate": rate,
            "num_prompts": num_prompts,
            "ndcg_at_1": ndcg if rate else None,
            "clip": 2.0,
            "num_steps": 40,
        }
        for seed, rates in enumerate(rates_by_seed)
        for lam, rate in zip(lams, rates, strict=True)
    ]


def measure(trials, lams=LAMS):
    return measure_onset(trials, lams, sorted({trial["seed"] for trial in trials}))


def make_onset(low, high):
    return {"low": low, "high": high, "clip": 2.0, "num_steps": 40}


def make_prediction(star, **changes):
    low, high = (None, None) if star is None else (star - 0.01, star + 0.01)
    return {
        "kind": "apriori",
        "clip": 2.0,
        "num_steps": 120,
        "lambda_star": star,
        "lambda_star_low": low,
        "lambda_star_high": high,
        **changes,
    }


@pytest.mark.parametrize(
    ("rates", "onset"),
    [
        ([0.7, 0.7, 0.6, 0.1, 0.0], (1.3, 1.4)),
        ([0.7, 0.7, 0.6, 0.6, 0.34], (1.4, 1.5)),
        ([0.7, 0.2, 0.6, 0.1, 0.0], (1.3, 1.4)),  # a dip that recovers is no onset
        ([0.7, 0.2, 0.1, 0.1, 0.0], (1.0, 1.2)),
        ([0.7, 0.7, 0.1, 0.1, 0.35], (1.5, math.inf)),  # 0.35 is the floor, not below it
    ],
)
def test_the_onset_is_where_parsing_falls_below_the_floor_for_good(rates, onset):
    assert find_onset(LAMS, rates, floor=0.35) == onset


def test_parsing_below_the_floor_from_the_start_is_an_error():
    with pytest.raises(ValueError, match="below the floor at every λ"):
        find_onset([1.0, 1.2], [0.1, 0.0], floor=0.35)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0.2, 1))
def test_no_point_at_or_past_the_onset_holds_and_the_one_before_does(rates, first):
    rates = [first, *rates]
    low, high = find_onset(LAMS, rates, first / 2)
    held = dict(zip(LAMS, (rate >= first / 2 for rate in rates), strict=True))
    assert held[low]
    assert not any(held[lam] for lam in LAMS if lam >= high)
    assert LAMS.index(low) + 1 == (LAMS.index(high) if high < math.inf else len(LAMS))


def test_the_floor_is_half_of_the_mean_at_lambda_1_and_the_onset_that_of_the_mean_curve():
    seeds = [[0.8, 0.7, 0.7, 0.0, 0.0], [0.6, 0.6, 0.1, 0.1, 0.0], [0.7, 0.7, 0.6, 0.5, 0.0]]
    onset = measure(make_trials(seeds))
    assert onset["floor"] == pytest.approx(0.35)
    assert onset["parse_rates"] == pytest.approx([0.7, 2 / 3, 1.4 / 3, 0.2, 0.0])
    assert (onset["low"], onset["high"]) == (1.3, 1.4)
    assert onset["onset_by_seed"] == {"0": [1.3, 1.4], "1": [1.2, 1.3], "2": [1.4, 1.5]}


def test_the_bootstrap_spans_the_seeds_and_is_one_point_where_they_agree():
    apart = [[0.8, 0.8, 0.8, 0.0, 0.0], [0.8, 0.0, 0.0, 0.0, 0.0], [0.8, 0.8, 0.8, 0.8, 0.0]]
    low, high = measure(make_trials(apart))["onset_interval"]
    assert (low, high) == (1.2, 1.5)
    agreeing = measure(make_trials([apart[0]] * 3))
    assert agreeing["onset_interval"] == [1.4, 1.4]
    # Near the floor the prompts decide: 0.41 of 64 is not told from 0.4.
    near = [[0.8, 0.8, 0.8, 0.41, 0.0]] * 3
    assert measure(make_trials(near, num_prompts=64))["onset_interval"] == [1.4, 1.5]
    assert measure(make_trials(near, num_prompts=10**6))["onset_interval"] == [1.5, 1.5]


def test_a_curve_that_never_breaks_has_no_upper_edge():
    onset = measure(make_trials([[0.7] * 5]))
    assert (onset["low"], onset["high"]) == (1.5, None)
    assert onset["onset_interval"] == [None, None]
    assert onset["shape"]["share_at_onset"] is None


def test_a_curve_lacks_neither_a_trial_nor_lambda_1():
    trials = make_trials([[0.7] * 5] * 2)
    for whole, first in (
        (lambda t: (t["seed"], t["lam"]) != (1, 1.3), r"^1 trials .* \(1, 1\.3\)$"),
        (lambda t: t["seed"] == 0, r"^5 trials .* \(1, 1\.0\)$"),  # a seed
        (lambda t: t["lam"] < 1.4, r"^4 trials .* \(0, 1\.4\)$"),  # the end of the grid
    ):
        with pytest.raises(ValueError, match=first):
            measure_onset([t for t in trials if whole(t)], LAMS, [0, 1])
    with pytest.raises(ValueError, match="no λ = 1"):
        measure_onset([t for t in trials if t["lam"] != 1.0], LAMS[1:], [0, 1])


def test_a_curve_that_parses_nothing_at_lambda_1_has_no_onset():
    with pytest.raises(ValueError, match="nothing parses at λ = 1"):
        measure(make_trials([[0.0] * 5]))


def test_no_onset_below_lambda_star_is_rescaled():
    prediction = budget_prediction(1.5, make_onset(1.2, 1.4), to_steps=80, step=0.01)
    assert prediction["lambda_star"] is None
    assert prediction["not_testable"] == "not testable: the onset is below λ*"


def test_the_shape_says_how_deep_the_cliff_is_and_whether_the_ranking_moved():
    trials = make_trials([[0.8, 0.8, 0.2, 0.04, 0.0]])
    trials[2]["ndcg_at_1"] = 0.76
    trials[3]["ndcg_at_1"] = 0.1  # of too few outputs to count
    shape = measure(trials)["shape"]
    assert shape["share_at_onset"] == pytest.approx(0.25)
    assert shape["share_one_later"] == pytest.approx(0.05)
    assert shape["ndcg_at_1_spread"] == pytest.approx(0.16)
    assert shape["ranking_unmoved"] is False


@pytest.mark.parametrize(
    ("star", "inside"),
    [(1.249, False), (1.251, True), (1.35, True), (1.449, True), (1.451, False)],
)
def test_a_prediction_is_inside_within_half_a_step_of_the_onset_interval(star, inside):
    test = judge("core", make_prediction(star), make_onset(1.3, 1.4), step=0.1)
    assert test["inside"] is inside
    assert test["predicted"] == star
    assert (test["measured_low"], test["measured_high"]) == (1.3, 1.4)


def test_a_test_keeps_what_its_prediction_rests_on_and_said_against_itself():
    origin = {"teacher_mass": 0.8, "in_scope": False, "out_of_scope": ["no headroom"]}
    test = judge("core", make_prediction(1.35, **origin), make_onset(1.3, 1.4), step=0.1)
    assert {key: test[key] for key in origin} == origin


def test_what_cannot_be_decided_is_none_with_the_reason():
    nothing = judge("core", make_prediction(None), make_onset(1.3, 1.4), step=0.1)
    assert (nothing["inside"], nothing["why"]) == (None, "nothing predicted")
    beyond = judge("core", make_prediction(1.58), make_onset(1.5, None), step=0.1)
    assert (beyond["inside"], beyond["why"]) == (None, "holds at every λ up to 1.5")
    too_early = judge("core", make_prediction(1.4), make_onset(1.5, None), step=0.1)
    assert too_early["inside"] is False  # it holds where it was to break
    vague = make_prediction(1.35, not_testable="not testable: a shift of 0.1")
    assert judge("core", vague, make_onset(1.3, 1.4), step=0.1)["inside"] is None


def test_the_budget_prediction_moves_each_edge_towards_lambda_star():
    prediction = budget_prediction(1.3, make_onset(1.7, 1.8), to_steps=80, step=0.05)
    # 1.3 + (1.7 − 1.3)·40/80 and 1.3 + (1.8 − 1.3)·40/80
    assert prediction["lambda_star_low"] == pytest.approx(1.5)
    assert prediction["lambda_star_high"] == pytest.approx(1.55)
    assert prediction["lambda_star"] == pytest.approx(1.525)
    assert prediction["not_testable"] is None


@pytest.mark.parametrize(("step", "testable"), [(0.074, True), (0.076, False)])
def test_a_shift_below_three_grid_steps_is_not_testable(step, testable):
    onset = make_onset(1.7, 1.8)  # moves by 0.225
    prediction = budget_prediction(1.3, onset, to_steps=80, step=step)
    assert (prediction["not_testable"] is None) == testable
    without = budget_prediction(1.3, make_onset(1.8, None), to_steps=80, step=step)
    assert without["lambda_star"] is None
    assert judge("b", {**make_prediction(1.3), **without}, onset, step)["inside"] is None


@pytest.mark.parametrize("study", ["cliff", "cliff/real", "cliff/real-long", "cliff/real-clip"])
def test_the_verdict_in_the_docs_follows_from_the_trials_and_predictions_beside_it(study):
    directory = Path(__file__).parents[2] / "docs" / study
    rows = [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]
    written = json.loads((directory / "verdict.json").read_text())
    assert study_verdict(directory, rows, written["plans"]) == written
    assert written["tests"]
    name = written["tests"][0]["name"].split()[0]
    for key in ("lams", "seeds"):
        plan = {key: written["plans"][name][key][:-1]}
        if not plan[key]:
            continue  # of a study of one seed
        thinned = written["plans"] | {name: written["plans"][name] | plan}
        with pytest.raises(ListopdError, match=f"locked for other λ or seeds than {name} has"):
            study_verdict(directory, rows, thinned)
    for row in rows:
        if row["curve"] == name:
            row["prediction_sha256"] = "another"
    with pytest.raises(ListopdError, match=f"is not the prediction that {name} was run under"):
        study_verdict(directory, rows, written["plans"])
