"""Where a contract broke, and whether that was predicted: from trials' results alone.

Floor: half of the strict parse at λ = 1, same clip, seeds and budget. Onset: the smallest λ of the
grid at which, and beyond which, the strict parse averaged over seeds is below the floor; its
interval runs from the λ before it to it. A prediction is inside if it lies in that interval widened
by half a grid step on each side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.cliff.calibration import FLOOR_SHARE, finite
from listopd_ray.cliff.threshold import rescale_onset
from listopd_ray.types import ListopdError

CRITERION = (
    "floor: half of the strict parse at λ = 1, averaged over seeds; onset: the smallest λ at which "
    "and beyond which it is below the floor; inside: λ* within the onset interval ± half a step"
)
NUM_RESAMPLES = 2000
TESTABLE_STEPS = 3  # a shift of the onset below so many grid steps cannot be told from none
RANKING_SPREAD = 0.15  # NDCG@1 of parsed outputs may move by this much along a curve
ENOUGH_PARSED = 0.05  # share of outputs that must parse for their NDCG to count
ORIGIN = (  # what a test keeps of an a-priori prediction: what it rests on
    "binding_class",
    "teacher_mass",
    "base_mass",
    "warm_start_parse_rate",
    "teacher_parse_rate",
    "in_scope",
    "out_of_scope",
    "hashes",
)


def study_verdict(
    directory: Path, rows: Sequence[Mapping[str, Any]], plans: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The object of verdict.json: the onset of every complete curve, and `tests`, the judgements.

    `rows` are the lines of trials.jsonl, `plans` the `lams` and `seeds` of every curve; the locked
    predictions lie in `directory`/predictions. Raises ListopdError where a trial was run under
    another prediction than the one that lies there, and where a plan is not the locked one.
    """
    tests, curves, incomplete = [], {}, {}
    for name, plan in plans.items():
        trials = [row for row in rows if row["curve"] == name]
        try:
            curves[name] = measure_onset(trials, plan["lams"], plan["seeds"])
        except ValueError as error:
            incomplete[name] = str(error)
            continue
        file = directory / "predictions" / f"{name}.json"
        if file.exists():
            locked = json.loads(file.read_text(encoding="utf-8"))
            if any(plan[key] != locked["plan"][key] for key in ("lams", "seeds")):
                raise ListopdError(f"{file}: was locked for other λ or seeds than {name} has")
            step = locked["plan"]["step"]
            if any(trial["prediction_sha256"] != sha256(file) for trial in trials):
                raise ListopdError(f"{file}: is not the prediction that {name} was run under")
            tests += [
                judge(f"{name} {prediction['kind']}", prediction, curves[name], step)
                | {"prediction_sha256": sha256(file)}
                for prediction in (locked, *locked["also"])
            ]
    return {
        "criterion": CRITERION,
        "tests": tests,
        "curves": curves,
        "incomplete": incomplete,
        "plans": {name: {k: plan[k] for k in ("lams", "seeds")} for name, plan in plans.items()},
    }


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def find_onset(
    lams: Sequence[float], parse_rates: Sequence[float], floor: float
) -> tuple[float, float]:
    """(low, high] of the onset; high = ∞ where the grid's last λ still holds."""
    below = [rate < floor for rate in parse_rates]
    if not below[-1]:
        return lams[-1], math.inf
    first = max((index + 1 for index, is_below in enumerate(below) if not is_below), default=0)
    if first == 0:
        raise ValueError("parsing is below the floor at every λ, the one it is taken from included")
    return lams[first - 1], lams[first]


def measure_onset(
    trials: Sequence[Mapping[str, Any]], lams: Sequence[float], seeds: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """Onset of one curve from its trials (`lam`, `seed`, `parse_rate`, `num_prompts`, `ndcg_at_1`).

    `onset_interval` is the 95 % range of the onset's λ in a bootstrap over seeds and, within a
    trial, prompts. Raises ValueError where a λ lacks a seed, λ = 1 is missing, or nothing parses
    there.
    """
    by_key = {(trial["seed"], trial["lam"]): trial for trial in trials}
    missing = [(s, lam) for s in seeds for lam in lams if (s, lam) not in by_key]
    if missing:
        raise ValueError(f"{len(missing)} trials are missing, the first at seed, λ = {missing[0]}")
    if not lams or lams[0] != 1.0:
        raise ValueError("there is no λ = 1 to take the floor from")
    rates = np.array([[by_key[s, lam]["parse_rate"] for lam in lams] for s in seeds])  # [S, L]
    mean = rates.mean(axis=0)
    if mean[0] == 0:
        raise ValueError("nothing parses at λ = 1")
    floor = FLOOR_SHARE * mean[0]
    low, high = find_onset(lams, mean, floor)
    num_prompts = trials[0]["num_prompts"]
    rng = np.random.default_rng(seed)
    onsets: list[float] = []
    for _ in range(NUM_RESAMPLES):
        drawn = rates[rng.integers(len(seeds), size=len(seeds))]
        redrawn = (rng.binomial(num_prompts, drawn) / num_prompts).mean(axis=0)
        if redrawn[0] > 0:
            onsets.append(find_onset(lams, redrawn, FLOOR_SHARE * redrawn[0])[1])
    interval = np.quantile(onsets, [0.025, 0.975], method="nearest")
    own = {s: find_onset(lams, r, FLOOR_SHARE * r[0]) for s, r in zip(seeds, rates, strict=True)}
    return {
        "lams": list(lams),
        "parse_rates": mean.tolist(),
        "floor": float(floor),
        "low": low,
        "high": finite(high),
        "clip": trials[0]["clip"],
        "num_steps": trials[0]["num_steps"],
        "onset_interval": [finite(float(edge)) for edge in interval],
        "onset_by_seed": {str(s): [low, finite(high)] for s, (low, high) in own.items()},
        "num_seeds": len(seeds),
        "shape": _shape(trials, lams, mean, high),
    }


def judge(
    name: str, prediction: Mapping[str, Any], onset: Mapping[str, Any], step: float
) -> dict[str, Any]:
    """One entry of verdict.json's `tests`; `inside` is None, with `why`, where nothing is decided.

    `prediction` has `kind`, `clip`, `num_steps`, `lambda_star` with `_low` and `_high`, and perhaps
    `not_testable`. Numbers that do not exist are None.
    """
    predicted = prediction["lambda_star"]
    low, high = onset["low"], onset["high"]
    test = {
        "name": name,
        "kind": prediction["kind"],
        "clip": prediction["clip"],
        "num_steps": prediction["num_steps"],
        "predicted": predicted,
        "predicted_low": prediction["lambda_star_low"],
        "predicted_high": prediction["lambda_star_high"],
        "measured_low": low,
        "measured_high": high,
        **{key: prediction[key] for key in ORIGIN if key in prediction},
    }
    if prediction.get("not_testable"):
        return test | {"inside": None, "why": prediction["not_testable"]}
    if predicted is None:
        return test | {"inside": None, "why": "nothing predicted"}
    if predicted < low - step / 2:
        return test | {"inside": False}
    if high is None:
        return test | {"inside": None, "why": f"holds at every λ up to {low:g}"}
    return test | {"inside": predicted <= high + step / 2}


def budget_prediction(
    star: float | None, onset: Mapping[str, Any], *, to_steps: int, step: float
) -> dict[str, Any]:
    """The onset at `to_steps` updates from one measured at another budget, and λ*, `star`.

    λ* + (onset − λ*)·N/N′ for each edge; `not_testable` where the middle moves by less than three
    grid steps.
    """
    edges = [onset["low"], onset["high"]]
    missing = dict.fromkeys(("lambda_star", "lambda_star_low", "lambda_star_high"))
    if star is not None and onset["high"] is not None and onset["high"] <= star:
        return {**missing, "not_testable": "not testable: the onset is below λ*"}
    if star is None or None in edges:
        return {**missing, "not_testable": "no onset or λ* to start from"}
    rescaled = [rescale_onset(star, edge, onset["num_steps"], to_steps) for edge in edges]
    shift = abs(sum(edges) - sum(rescaled)) / 2
    is_small = shift < TESTABLE_STEPS * step
    why = f"not testable: a shift of {shift:.3f} is below {TESTABLE_STEPS} grid steps of {step:g}"
    return {
        "lambda_star": sum(rescaled) / 2,
        "lambda_star_low": min(rescaled),
        "lambda_star_high": max(rescaled),
        "not_testable": why if is_small else None,
    }


def _shape(
    trials: Sequence[Mapping[str, Any]], lams: Sequence[float], mean: np.ndarray, high: float
) -> dict[str, Any]:
    """What a cliff looks like: half at the onset, a quarter a point later, ranking unmoved."""
    shares = [float(rate / mean[0]) for rate in mean]
    at = lams.index(high) if math.isfinite(high) else None
    ndcg = {
        lam: float(np.mean(values))
        for lam in lams
        if (
            values := [
                t["ndcg_at_1"]
                for t in trials
                if t["lam"] == lam
                and t["parse_rate"] >= ENOUGH_PARSED
                and t["ndcg_at_1"] is not None
            ]
        )
    }
    spread = max(abs(value - ndcg[1.0]) for value in ndcg.values()) if 1.0 in ndcg else None
    after = at is not None and at + 1 < len(lams)
    return {
        "share_at_onset": shares[at] if at is not None else None,
        "share_one_later": shares[at + 1] if at is not None and after else None,
        "ndcg_at_1_spread": spread,
        "ranking_unmoved": None if spread is None else spread <= RANKING_SPREAD,
    }
