import json
import math

import numpy as np
import pytest
from fakes import make_rollout

from listopd_ray.calibrate import read_onset
from listopd_ray.cliff.calibration import (
    FIRST_ID,
    UNUSED_ID,
    measure,
    pool,
    predict,
    scale_prediction,
)
from listopd_ray.cliff.threshold import clip_exit, lambda_star, runaway
from listopd_ray.job_config import CalibrateConfig
from listopd_ray.types import ListopdError, ScoredRollout, TokenClass

# Opening, id, separator, id, closing, end: an output of two items.
CLASSES = [
    TokenClass.OPENING,
    TokenClass.ITEM_ID,
    TokenClass.SEPARATOR,
    TokenClass.ITEM_ID,
    TokenClass.CLOSING,
    TokenClass.CLOSING,
]
MASSES = {  # class → (p, b)
    TokenClass.OPENING: (0.99, 0.95),
    TokenClass.ITEM_ID: (0.767, 0.288),
    TokenClass.SEPARATOR: (0.99, 0.95),
    TokenClass.CLOSING: (0.99, 0.95),
    TokenClass.STRAY: (0.1, 0.9),  # counts nowhere
}
WARM_START = {"parse_rate": 0.35, "ndcg_at_1": 0.55, "ndcg_at_1_interval": [0.5, 0.6]}
TEACHER = {"parse_rate": 0.8, "ndcg_at_1": 0.9, "ndcg_at_1_interval": [0.88, 0.92]}


def make_scored(prompt, masses=MASSES, classes=CLASSES, spread=0.0, rng=None):
    """An output with these masses at each class; those of ids are off by up to `spread`."""
    pairs = np.array([masses[token_class] for token_class in classes])
    is_id = np.array([token_class == TokenClass.ITEM_ID for token_class in classes])
    if spread:
        pairs[is_id] += rng.uniform(-spread, spread, pairs[is_id].shape)
    unused = np.where(is_id[:, None], (0.97, 0.9), np.nan)
    zeros = np.zeros(len(classes), dtype=np.float32)
    ratios = np.where(is_id, np.tile([1.0, -4.0], len(classes))[: len(classes)], 0.04)
    return ScoredRollout(
        rollout=make_rollout([1], [2] * len(classes), num_items=2, prompt_id=prompt),
        teacher_logprobs=ratios.astype(np.float32),
        base_logprobs=zeros,
        modal_ids=zeros.astype(np.int32),
        teacher_modal_logprobs=np.log(pairs[:, 0]),
        base_modal_logprobs=np.log(pairs[:, 1]),
        token_classes=np.array(classes, dtype=np.int8),
        teacher_unused_mass=unused[:, 0],
        base_unused_mass=unused[:, 1],
    )


def make_prediction(scored, clip=2.0, warm_start=WARM_START, teacher=TEACHER):
    return predict(measure(scored), clip=clip, warm_start=warm_start, teacher=teacher)


def test_masses_are_means_over_the_positions_of_a_class_on_valid_prefixes():
    halves = {**MASSES, TokenClass.ITEM_ID: (0.5, 0.2)}
    broken = [*CLASSES[:2], TokenClass.STRAY, TokenClass.STRAY]
    scored = [make_scored("a"), make_scored("b"), make_scored("b", halves, broken)]
    row = make_prediction(scored)["classes"]["item_id"]
    assert row["teacher_mass"] == pytest.approx((4 * 0.767 + 0.5) / 5)
    assert row["base_mass"] == pytest.approx((4 * 0.288 + 0.2) / 5)
    assert row["num_positions"] == 5
    closing = make_prediction(scored)["classes"]["closing"]
    assert (closing["teacher_mass"], closing["num_positions"]) == (pytest.approx(0.99), 4)


@pytest.mark.parametrize(("clip", "star"), [(1.3, 1.125), (2.0, 1.331), (5.0, 1.768)])
def test_the_binding_class_is_the_unresolved_one_and_gives_the_reference_thresholds(clip, star):
    prediction = make_prediction([make_scored(str(n)) for n in range(20)], clip)
    assert prediction["kind"] == "apriori"
    assert prediction["binding_class"] == "item_id"
    assert prediction["lambda_star"] == pytest.approx(star, abs=1e-3)
    assert prediction["teacher_mass"] == pytest.approx(0.767)
    assert prediction["base_mass"] == pytest.approx(0.288)
    assert prediction["in_scope"]
    assert {name: row["kind"] for name, row in prediction["classes"].items()} == {
        "opening": "resolved",
        "item_id": "unresolved",
        "separator": "resolved",
        "closing": "resolved",
        UNUSED_ID: "resolved",
        FIRST_ID: "unresolved",
    }


def test_a_resolved_class_with_a_smaller_lambda_star_binds_nothing():
    sharp = {**MASSES, TokenClass.OPENING: (0.9999, 0.51)}
    prediction = make_prediction([make_scored("a", sharp)])
    assert prediction["classes"]["opening"]["lambda_star"] < prediction["lambda_star"]
    assert prediction["binding_class"] == "item_id"


def test_the_first_id_has_its_own_masses_and_binds_nothing():
    scored = [make_scored(str(n)) for n in range(2)]
    for part in scored:
        part.base_modal_logprobs[1] = math.log(0.1)  # of the two ids the first
    prediction = make_prediction(scored)
    row = prediction["classes"][FIRST_ID]
    assert (row["teacher_mass"], row["base_mass"]) == pytest.approx((0.767, 0.1))
    assert row["num_positions"] == 2
    assert row["lambda_star"] == pytest.approx(lambda_star(0.767, 0.1, 2.0))
    assert prediction["binding_class"] == "item_id"
    assert prediction["base_mass"] == pytest.approx((0.1 + 0.288) / 2)


def test_any_unused_id_is_a_second_pair_that_never_binds():
    free = dict.fromkeys(TokenClass, (0.99, 0.95))
    scored = [make_scored("a", free)]
    for part in scored:
        part.base_unused_mass[:] = np.where(np.isnan(part.base_unused_mass), np.nan, 0.3)
    prediction = make_prediction(scored)
    assert prediction["classes"][UNUSED_ID]["kind"] == "unresolved"
    assert prediction["classes"][UNUSED_ID]["base_mass"] == pytest.approx(0.3)
    assert prediction["binding_class"] is None
    assert prediction["lambda_star"] is None
    assert prediction["out_of_scope"][0].startswith("no unresolved class")


def test_a_teacher_that_does_not_tell_the_mass_of_the_unused_ids_loses_that_class_alone():
    plain, silent = make_prediction([make_scored("a")]), make_scored("a")
    silent.teacher_unused_mass[:] = np.nan
    prediction = make_prediction([silent])
    assert UNUSED_ID not in prediction["classes"]
    del plain["classes"][UNUSED_ID]
    assert prediction == plain  # with the first id, and escape


def test_the_interval_covers_the_truth_as_often_as_it_says_and_narrows_with_prompts():
    rng = np.random.default_rng(0)
    truth = 1 + math.log(2) / (math.log(0.7 / 0.3) - math.log(0.3 / 0.7))
    masses = {**MASSES, TokenClass.ITEM_ID: (0.7, 0.3)}
    widths, covered = [], 0
    for _ in range(60):
        scored = [make_scored(str(n), masses, spread=0.25, rng=rng) for n in range(40)]
        prediction = make_prediction(scored)
        covered += prediction["lambda_star_low"] <= truth <= prediction["lambda_star_high"]
        widths.append(prediction["lambda_star_high"] - prediction["lambda_star_low"])
    assert covered >= 52  # of 60 at 95 %
    many = [make_scored(str(n), masses, spread=0.25, rng=rng) for n in range(640)]
    prediction = make_prediction(many)
    width = prediction["lambda_star_high"] - prediction["lambda_star_low"]
    assert width == pytest.approx(np.mean(widths) / 4, rel=0.25)


def test_outputs_of_one_prompt_are_resampled_together():
    rng = np.random.default_rng(0)
    single = [make_scored(str(n), spread=0.2, rng=rng) for n in range(40)]
    repeated = [part for part in single for _ in range(9)]
    one, nine = make_prediction(single), make_prediction(repeated)
    assert one["lambda_star_low"] == pytest.approx(nine["lambda_star_low"])
    assert nine["num_outputs"] == 9 * one["num_outputs"]
    assert nine["num_prompts"] == one["num_prompts"] == 40


def test_pooled_warm_starts_weigh_by_positions():
    other = {**MASSES, TokenClass.ITEM_ID: (0.7, 0.2)}
    masses = pool([measure([make_scored("a")]), measure([make_scored("a", other)])])
    prediction = predict(masses, clip=2.0, warm_start=WARM_START, teacher=TEACHER)
    assert prediction["teacher_mass"] == pytest.approx((0.767 + 0.7) / 2)
    assert prediction["base_mass"] == pytest.approx((0.288 + 0.2) / 2)
    assert prediction["num_outputs"] == 2


def test_a_reversed_class_has_an_onset_where_an_output_parses_half_as_often():
    masses = {**MASSES, TokenClass.CLOSING: (0.9, 0.97)}
    prediction = make_prediction([make_scored("a", masses)])
    row = prediction["classes"]["closing"]
    assert row["kind"] == "reversed"
    # Two positions: q² = ½·0.9². There the tail's force, log((1 − q)/(1 − p)), is past log c.
    q = math.sqrt(0.5) * 0.9
    gap = math.log(0.97 / 0.03) - math.log(0.9 / 0.1)
    force = math.log(0.9 / q) + math.log(2)
    assert math.log((1 - q) / 0.1) > math.log(2)
    assert row["reversed_onset"] == pytest.approx(1 + force / gap)
    assert row["reversed_runaway"] == pytest.approx(1 + 2 * math.log(2) / gap)
    assert "lambda_star" not in row
    # At 1.81 it comes after the λ* of item ids.
    assert prediction["in_scope"]
    early = {**MASSES, TokenClass.CLOSING: (0.5, 0.97)}
    reasons = make_prediction([make_scored("a", early)])["out_of_scope"]
    assert reasons == ["closing is reversed (p < b): parsing halves at λ = 1.17 already"]


@pytest.mark.parametrize(
    ("warm_start", "teacher", "reason"),
    [
        ({"parse_rate": 0.97}, {}, "no headroom: 97% of the warm start's outputs parse"),
        ({"parse_rate": 0.01}, {}, "no headroom: 1% of the warm start's outputs parse"),
        (
            {"ndcg_at_1": 0.9, "ndcg_at_1_interval": [0.89, 0.91]},
            {},
            "no knowledge gap: NDCG@1 of the teacher 0.90, of the warm start 0.90",
        ),
    ],
)
def test_a_prediction_out_of_scope_says_why(warm_start, teacher, reason):
    prediction = make_prediction(
        [make_scored("a")], warm_start=WARM_START | warm_start, teacher=TEACHER | teacher
    )
    assert not prediction["in_scope"]
    assert prediction["out_of_scope"] == [reason]
    assert prediction["lambda_star"] == pytest.approx(1.331, abs=1e-3)


def test_too_wide_an_interval_is_out_of_scope():
    rng = np.random.default_rng(0)
    masses = {**MASSES, TokenClass.ITEM_ID: (0.5, 0.4)}
    scored = [make_scored(str(n), masses, spread=0.35, rng=rng) for n in range(8)]
    reasons = make_prediction(scored)["out_of_scope"]
    assert reasons == ["the interval of λ* is wider than λ* − 1: measure on more prompts"]


def test_an_onset_scales_to_another_clip_edge_by_edge():
    source = {"low": 1.3, "high": 1.4, "clip": 2.0, "num_steps": 120}
    prediction = scale_prediction(source, 5.0)
    ratio = math.log(5) / math.log(2)
    assert prediction["kind"] == "calibrated"
    assert prediction["lambda_star_low"] == pytest.approx(1 + 0.3 * ratio)
    assert prediction["lambda_star_high"] == pytest.approx(1 + 0.4 * ratio)
    assert prediction["lambda_star"] == pytest.approx(1 + 0.35 * ratio)
    assert (prediction["clip"], prediction["num_steps"]) == (5.0, 120)
    assert (prediction["clip_exit"], prediction["runaway"]) == (None, None)  # of no known masses


def test_a_calibrated_prediction_keeps_what_its_onset_was_measured_on():
    origin = {
        "binding_class": "item_id",
        "teacher_mass": 0.767,
        "base_mass": 0.288,
        "hashes": {"data": ["d"]},
    }
    source = {"low": 1.3, "high": 1.4, "clip": 2.0, "num_steps": 120, **origin}
    prediction = scale_prediction(source, 5.0)
    assert {key: prediction[key] for key in origin} == origin
    assert prediction["clip_exit"] == pytest.approx(clip_exit(0.767, 0.288, 5.0))
    assert prediction["runaway"] == pytest.approx(runaway(0.767, 0.288, 5.0))


def test_an_onset_is_read_by_budget_clip_and_curve(tmp_path):
    def curve(clip, num_steps=120, high=1.4):
        return {"low": 1.3, "high": high, "clip": clip, "num_steps": num_steps}

    curves = {
        "core": curve(2.0),
        "fine": curve(2.0, high=1.35),
        "five": curve(5.0, high=1.9),
        "short": curve(2.0, num_steps=30, high=1.6),
        "holds": curve(2.0, num_steps=60, high=None),
    }
    test = {"name": "fine apriori", "kind": "apriori", "teacher_mass": 0.8, "base_mass": 0.3}
    escape = {"name": "fine escape", "kind": "escape"}
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps({"curves": curves, "tests": [test, escape]}))

    def read(**settings):
        return read_onset(CalibrateConfig(from_=str(file), **settings))

    fine = read(from_curve="fine", clip=5.0)
    assert (fine["high"], fine["teacher_mass"], fine["base_mass"]) == (1.35, 0.8, 0.3)
    assert read(from_curve="core")["high"] == 1.4
    assert read(clip=4.0)["high"] == 1.9
    assert read(num_steps=30, clip=1.3)["high"] == 1.6
    for settings, error in (
        ({"clip": 1.3}, r"several onsets, give from_curve=… \(core, fine; "),
        ({"num_steps": 60}, "no onset measured with num_steps 60"),
        ({"from_clip": 5.0, "from_curve": "core"}, "with num_steps 120, clip 5.0, curve core"),
        ({"clip": math.inf}, "clip: an onset gives no prediction for c = ∞"),
    ):
        with pytest.raises(ListopdError, match=error):
            read(**settings)


def test_a_bracket_of_another_budget_or_none_at_all_is_refused(tmp_path):
    file = tmp_path / "bracket.json"
    file.write_text(json.dumps({"low": 1.3, "high": 1.4, "clip": 2.0, "num_steps": 30}))
    config = CalibrateConfig(from_=str(file), clip=5.0, num_steps=30)
    assert read_onset(config)["high"] == 1.4
    with pytest.raises(ListopdError, match="no onset measured with num_steps 120"):
        read_onset(CalibrateConfig(from_=str(file), clip=5.0))
    broken_test = '{"curves": {}, "tests": [{"name": "a"}]}'
    others = ("[]", "{}", "3", '"low"', '["low"]', '{"tests": []}', '{"tests": [], "curves": []}')
    for content in (*others, broken_test):
        file.write_text(content)
        with pytest.raises(ListopdError, match=r"neither a bracket\.json nor a verdict\.json"):
            read_onset(config)


@pytest.mark.parametrize(
    "change",
    [
        {"clip": "2"},
        {"clip": None},
        {"clip": 1.0},
        {"low": 0.5},
        {"low": None},
        {"low": 1.4},
        {"high": "1.4"},
        {"high": math.nan},
        {"high": math.inf},
    ],
)
def test_an_onset_with_numbers_that_are_none_is_refused(tmp_path, change):
    file = tmp_path / "bracket.json"
    onset = {"low": 1.3, "high": 1.4, "clip": 2.0, "num_steps": 120}
    file.write_text(json.dumps(onset | change))
    with pytest.raises(ListopdError, match="bracket: no onset: low"):
        read_onset(CalibrateConfig(from_=str(file), clip=5.0))


def test_escape_is_where_the_mean_advantage_of_first_ids_falls_to_the_clips_bound():
    # Even places have a log-ratio of 1, odd ones of −4: the first id stands at 1, or at 2.
    prediction = make_prediction([make_scored(str(n)) for n in range(4)])
    assert prediction["first_log_ratio"] == pytest.approx(-4.0)
    assert prediction["first_clipped_log_ratio"] == pytest.approx(-math.log(2))
    assert prediction["escape"] == pytest.approx(1.0)  # I = −log c already
    shifted = [TokenClass.OPENING, *CLASSES]
    scored = [make_scored("a", classes=shifted), make_scored("b")]
    prediction = make_prediction(scored)
    assert prediction["first_log_ratio"] == pytest.approx(-1.5)  # of 1 and −4; I = 0
    assert prediction["escape"] == pytest.approx(1 + math.log(2) / 1.5)
    assert prediction["escape_low"] == pytest.approx(1.0)
    assert prediction["escape_high"] is None  # of prompts like the first alone
    no_id = make_prediction([make_scored("a", classes=[TokenClass.OPENING, TokenClass.STRAY])])
    assert no_id["escape"] is None


def test_without_a_clip_there_is_no_threshold():
    prediction = make_prediction([make_scored("a")], clip=math.inf)
    assert prediction["lambda_star"] is None
    assert prediction["clip"] is None
    reason = "no threshold: there is no clip, or teacher and base agree (p = b)"
    assert prediction["out_of_scope"] == [reason]
    agreeing = {**MASSES, TokenClass.ITEM_ID: (0.4, 0.4)}
    assert make_prediction([make_scored("a", agreeing)])["out_of_scope"] == [reason]
