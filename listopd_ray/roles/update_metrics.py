"""What one update says of itself: scalars from its per-token columns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from listopd_ray.roles.losses import Update
from listopd_ray.types import CONTRACT_CLASSES


def update_metrics(columns: dict[str, np.ndarray], update: Update) -> dict[str, float]:
    """Scalars of one update from its per-token columns."""
    bound, (low, high) = math.log(update.clip), update.ratio_range
    gap = columns["teacher"] - columns["learner"]
    mismatch = columns["learner"] - columns["sampler"]
    ratio = np.exp(mismatch)
    metrics: dict[str, Any] = {
        "loss/policy": columns["loss"].sum(),
        "loss/advantage": columns["advantage"].mean(),
        "kl/reverse": -gap.mean(),
        "kl/mismatch": -mismatch.mean(),
        "kl/mismatch_max": np.abs(mismatch).max(),
        "loss/clip_fraction": (np.abs(gap) >= bound).mean(),
        "loss/importance_ratio_max": ratio.max(),
        "loss/ratio_clipped": ((ratio < low) | (ratio > high)).mean(),
        "loss/effective_sample_size": _effective_sample_size(ratio),
    }
    metrics |= _class_metrics(columns, gap, ratio, bound)
    return {name: float(value) for name, value in metrics.items()}


def _class_metrics(
    columns: dict[str, np.ndarray], gap: np.ndarray, ratio: np.ndarray, bound: float
) -> dict[str, Any]:
    """By contract class: reverse KL, clipping (of `gap`, log π_T − log π_θ, to ±`bound`), sample
    size, and p, b and q, the masses on the teacher's modal token; and what `threshold.escape`
    takes."""
    metrics: dict[str, Any] = {}
    owners = {"teacher": "teacher_modal", "base": "base_modal", "student": "student_modal"}
    for token_class in CONTRACT_CLASSES:
        where = columns["token_class"] == token_class
        if not where.any():
            continue
        name = token_class.name.lower()
        metrics[f"kl/reverse_{name}"] = -gap[where].mean()
        metrics[f"loss/clip_fraction_{name}"] = (np.abs(gap[where]) >= bound).mean()
        metrics[f"loss/effective_sample_size_{name}"] = _effective_sample_size(ratio[where])
        for owner, column in owners.items():
            if column in columns:
                metrics[f"cliff/{owner}_mass_{name}"] = np.exp(columns[column][where]).mean()
    first = columns["is_first_id"]
    if "base" in columns and first.any():
        metrics["cliff/first_log_ratio"] = (columns["teacher"] - columns["base"])[first].mean()
        metrics["cliff/first_clipped_log_ratio"] = gap[first].clip(-bound, bound).mean()
    for owner in ("teacher", "base"):
        unused = columns.get(f"{owner}_unused")
        if unused is not None and not np.isnan(unused).all():
            metrics[f"cliff/{owner}_unused_mass"] = np.nanmean(unused)
    return metrics


def _effective_sample_size(ratio: np.ndarray) -> float:
    """(Σ r)² / Σ r², as a share of the number of tokens."""
    return ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())
