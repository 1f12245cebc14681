"""λ* from measured masses: what teacher and warm start say on prefixes that the student visits.

Masses are means over the positions of a token class on contract-valid prefixes (where `scan` gives
the position a class): p, the teacher's mass on its own modal token, and b, the base's on that same
token. The logit is taken of each mean. Intervals are percentiles of a bootstrap over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from listopd_ray.cliff.threshold import (
    calibrated_lambda_star,
    clip_exit,
    escape,
    lambda_star,
    reversed_onset,
    reversed_runaway,
    runaway,
)
from listopd_ray.types import CONTRACT_CLASSES, ScoredRollout

UNUSED_ID = "unused_id"  # mass on any id not used yet: a second pair beside item_id's modal token
FIRST_ID = "first_id"  # item_id at the first item alone, where the student knows least
NOT_BINDING = (UNUSED_ID, FIRST_ID)  # reported beside the classes
NUM_RESAMPLES = 2000
HEADROOM = (0.05, 0.95)  # strict parse of a warm start that a cliff can be seen from
FLOOR_SHARE = 0.5  # a contract counts as broken below this share of its strict parse at λ = 1


@dataclass(frozen=True, kw_only=True)
class Masses:
    """What was measured on P prompts, by class."""

    sums: dict[str, np.ndarray]  # [P, 3]: positions, Σ teacher mass, Σ base mass of each prompt
    log_ratios: np.ndarray  # [n, 2]: prompt's row, log π_T/π_B of a sampled first id (nats)
    per_output: dict[str, int]  # positions in an output; of the longest measured
    num_outputs: int


def measure(scored: Sequence[ScoredRollout]) -> Masses:
    """Sums by class and prompt (in the order of prompt ids) of rollouts scored with a base."""
    prompts = sorted({part.rollout.prompt.id for part in scored})
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    names = [token_class.name.lower() for token_class in CONTRACT_CLASSES]
    sums = {name: np.zeros((len(prompts), 3)) for name in (*names, *NOT_BINDING)}
    per_output = dict.fromkeys(sums, 0)
    log_ratios = []

    def add(name: str, row: int, pair: np.ndarray) -> None:
        """The masses [2, n] of an output's n positions of a class."""
        sums[name][row] += pair.shape[1], *pair.sum(axis=1)
        per_output[name] = max(per_output[name], pair.shape[1])

    for part in scored:
        row = row_of[part.rollout.prompt.id]
        assert part.base_logprobs is not None and part.base_modal_logprobs is not None
        assert part.base_unused_mass is not None
        logprobs = np.array([part.teacher_modal_logprobs, part.base_modal_logprobs])  # [2, T]
        pair = np.exp(logprobs.clip(max=0.0).astype(np.float64))  # rounded above 1 is still 1
        for token_class, name in zip(CONTRACT_CLASSES, names, strict=True):
            add(name, row, pair[:, part.token_classes == token_class])
        unused = np.array([part.teacher_unused_mass, part.base_unused_mass]).clip(max=1.0)
        ids = np.flatnonzero(~np.isnan(unused[1]))
        known = ids[~np.isnan(unused[0, ids])]  # not every teacher tells
        add(UNUSED_ID, row, unused[:, known])
        for first in ids[:1]:
            add(FIRST_ID, row, pair[:, [first]])
            log_ratios.append((row, part.teacher_logprobs[first] - part.base_logprobs[first]))
    return Masses(
        sums=sums,
        log_ratios=np.array(log_ratios, dtype=np.float64).reshape(-1, 2),
        per_output=per_output,
        num_outputs=len(scored),
    )


def pool(measured: Sequence[Masses]) -> Masses:
    """Masses of several warm starts (seeds) on the same prompts as one."""
    names = measured[0].sums
    return Masses(
        sums={name: np.sum([masses.sums[name] for masses in measured], axis=0) for name in names},
        log_ratios=np.concatenate([masses.log_ratios for masses in measured]),
        per_output={name: max(masses.per_output[name] for masses in measured) for name in names},
        num_outputs=sum(masses.num_outputs for masses in measured),
    )


def predict(
    masses: Masses,
    *,
    clip: float,
    warm_start: Mapping[str, Any],
    teacher: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """The a-priori prediction as the object of `prediction.json`; infinities are None there.

    `warm_start` and `teacher` are their evaluations as `evaluation_to_dict` gives them; they decide
    whether the prediction is in scope. The binding class is the unresolved one (b ≤ ½ and b ≤ p)
    with the smallest λ*.
    """
    rng = np.random.default_rng(seed)
    num_prompts = len(masses.sums[UNUSED_ID])
    weights = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), NUM_RESAMPLES)
    classes = {
        name: _class_row(sums, weights, clip, masses.per_output[name])
        for name, sums in masses.sums.items()
        if sums[:, 0].sum() > 0
    }
    unresolved = {
        name: row
        for name, row in classes.items()
        if row["kind"] == "unresolved" and name not in NOT_BINDING
    }
    binding = min(unresolved, key=lambda name: unresolved[name]["lambda_star"], default=None)
    chosen = classes[binding] if binding else {}
    reasons = _out_of_scope(chosen if binding else None, classes, warm_start, teacher)
    return {
        "kind": "apriori",
        **{name: finite(chosen.get(name)) for name in ROW_OF_BINDING},
        **{name: finite(value) for name, value in _escape(masses, weights, clip).items()},
        "binding_class": binding,
        "clip": finite(clip),
        "in_scope": not reasons,
        "out_of_scope": reasons,
        "classes": {
            name: {key: finite(value) for key, value in row.items()}
            for name, row in classes.items()
        },
        "num_prompts": num_prompts,
        "num_outputs": masses.num_outputs,
        "warm_start_parse_rate": warm_start["parse_rate"],
        "teacher_parse_rate": teacher["parse_rate"],
    }


ROW_OF_BINDING = (
    "lambda_star",
    "lambda_star_low",
    "lambda_star_high",
    "clip_exit",
    "runaway",
    "teacher_mass",
    "base_mass",
)


def scale_prediction(source: Mapping[str, Any], clip: float) -> dict[str, Any]:
    """The calibrated prediction for `clip` from an onset interval measured at another clip.

    `source` holds `low`, `high` (the interval's edges, λ), `clip` and `num_steps`. Each edge is
    scaled by log c / log c₀ (one onset fixes Δ_eff); the prediction is the interval's middle. It
    speaks of the same models and the same number of updates: what `source` says of them is kept,
    and clip exit and runaway are those of its masses at `clip`.
    """
    low, high, from_clip = source["low"], source["high"], source["clip"]
    edges = [calibrated_lambda_star(edge, from_clip, clip) for edge in (low, high)]
    masses = ("binding_class", "teacher_mass", "base_mass")
    kept = ("num_steps", *masses, "in_scope", "out_of_scope", "hashes")
    p, b = source.get("teacher_mass"), source.get("base_mass")
    exits = (None, None) if p is None or b is None else (clip_exit(p, b, clip), runaway(p, b, clip))
    return {
        "kind": "calibrated",
        "lambda_star": sum(edges) / 2,
        "lambda_star_low": edges[0],
        "lambda_star_high": edges[1],
        "clip_exit": finite(exits[0]),
        "runaway": finite(exits[1]),
        "clip": clip,
        **{key: source[key] for key in kept if key in source},
        "from": {"clip": from_clip, "low": low, "high": high},
    }


def _class_row(
    sums: np.ndarray, weights: np.ndarray, clip: float, per_output: int
) -> dict[str, Any]:
    """Masses, kind and thresholds of one class; `per_output`: its positions in an output."""
    p, b = (float(sums[:, column].sum() / sums[:, 0].sum()) for column in (1, 2))
    resampled = weights @ sums  # [resamples, 3]
    resampled = resampled[resampled[:, 0] > 0]
    draws = [tuple(row) for row in (resampled[:, 1:] / resampled[:, :1]).clip(0, 1)]
    row: dict[str, Any] = {
        "kind": "reversed" if p < b else "resolved" if b > 0.5 else "unresolved",
        "teacher_mass": p,
        "teacher_mass_interval": _interval([draw[0] for draw in draws]),
        "base_mass": b,
        "base_mass_interval": _interval([draw[1] for draw in draws]),
        "num_positions": int(sums[:, 0].sum()),
    }
    if p < b:
        # All its positions must hold: parsing goes as q to their number.
        floor = FLOOR_SHARE * p**per_output
        row["reversed_onset"] = reversed_onset(p, b, per_output, floor, clip)
        row["reversed_runaway"] = reversed_runaway(p, b, clip)
        return row
    row["lambda_star"] = lambda_star(p, b, clip)
    stars = [lambda_star(tp, tb, clip) if tp > tb else math.inf for tp, tb in draws]
    row["lambda_star_low"], row["lambda_star_high"] = _interval(stars)
    row["clip_exit"], row["runaway"] = clip_exit(p, b, clip), runaway(p, b, clip)
    return row


def _escape(masses: Masses, weights: np.ndarray, clip: float) -> dict[str, Any]:
    """The escape threshold with its interval, and what it rests on.

    At the first id, where the student knows least: a later one is easier, the more so the fewer
    items are left.
    """
    names = ("escape", "escape_low", "escape_high", "first_log_ratio", "first_clipped_log_ratio")
    if math.isinf(clip) or not len(masses.log_ratios):
        return dict.fromkeys(names)
    bound = math.log(clip)
    rows, ratio = masses.log_ratios[:, 0].astype(np.int64), masses.log_ratios[:, 1]
    columns = (np.ones_like(ratio), ratio, ratio.clip(-bound, bound))
    sums = np.stack([np.bincount(rows, c, weights.shape[1]) for c in columns], axis=1)
    count, total, clipped = sums.sum(axis=0).tolist()
    draws = weights @ sums  # [resamples, 3]
    draws = draws[draws[:, 0] > 0]
    interval = _interval([escape(d / n, i / n, clip) for n, d, i in draws.tolist()])
    log_ratio, clipped_log_ratio = total / count, clipped / count
    values = (escape(log_ratio, clipped_log_ratio, clip), *interval, log_ratio, clipped_log_ratio)
    return dict(zip(names, values, strict=True))


def _out_of_scope(
    binding: Mapping[str, Any] | None,
    classes: Mapping[str, Mapping[str, Any]],
    warm_start: Mapping[str, Any],
    teacher: Mapping[str, Any],
) -> list[str]:
    reasons = []
    if binding is None:
        reasons.append("no unresolved class: the base prefers the teacher's token everywhere")
    elif math.isinf(binding["lambda_star"]):
        reasons.append("no threshold: there is no clip, or teacher and base agree (p = b)")
    elif binding["lambda_star_high"] - binding["lambda_star_low"] > binding["lambda_star"] - 1:
        reasons.append("the interval of λ* is wider than λ* − 1: measure on more prompts")
    parse_rate = warm_start["parse_rate"]
    if not HEADROOM[0] <= parse_rate <= HEADROOM[1]:
        reasons.append(f"no headroom: {parse_rate:.0%} of the warm start's outputs parse")
    better, worse = teacher["ndcg_at_1_interval"][0], warm_start["ndcg_at_1_interval"][1]
    if better is not None and worse is not None and better <= worse:
        reasons.append(
            f"no knowledge gap: NDCG@1 of the teacher {teacher['ndcg_at_1']:.2f}, of the warm "
            f"start {warm_start['ndcg_at_1']:.2f}"
        )
    onsets = {n: row["reversed_onset"] for n, row in classes.items() if "reversed_onset" in row}
    for name, onset in onsets.items():
        if name not in NOT_BINDING and (binding is None or onset < binding["lambda_star"]):
            reasons.append(f"{name} is reversed (p < b): parsing halves at λ = {onset:.2f} already")
    return reasons


def _interval(values: Sequence[float]) -> list[float]:
    # Order statistics: an interpolation between infinities would be NaN.
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return [float(low), float(high)]


def finite(value: Any) -> Any:
    """For JSON, which lacks infinities and NaN: None in their place, in lists too."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
