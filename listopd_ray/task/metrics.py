"""Contract and ranking metrics of judged completions, each with a 95 % interval."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sklearn
from scipy import stats
from sklearn.metrics import ndcg_score

from listopd_ray.task.contract import REASONS
from listopd_ray.types import Estimate, Evaluation, Judged

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
PARSED_METRICS = ("ndcg_at_1", "ndcg_at_k", "kendall_tau")
ALL_METRICS = tuple(f"{name}_all" for name in PARSED_METRICS)  # unparsed outputs counted as zero


def evaluate_judged(
    judged: Sequence[Judged], relevance: Mapping[str, Sequence[float]], seed: int = 0
) -> Evaluation:
    """Average `judged` over prompts; `relevance` holds each prompt's gains by example id.

    Rank metrics are averaged within a prompt first and bootstrapped over prompts. A prompt without
    any relevance is left out of them, one with constant relevance out of τ, which it leaves
    undefined. The parse rate counts outputs, and its interval (Wilson) takes them as independent.
    """
    by_prompt: dict[str, dict[str, list[float]]] = {
        name: defaultdict(list) for name in PARSED_METRICS + ALL_METRICS
    }
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        for output in judged:
            for name, score in _scores(output, relevance[output.example_id]).items():
                by_prompt[name][output.example_id].append(score)
    prompts = {output.example_id for output in judged}
    reasons = Counter(output.reason for output in judged)
    return Evaluation(
        parse_rate=_wilson(sum(output.ranking is not None for output in judged), len(judged)),
        num_prompts=len(prompts),
        num_without_relevance=sum(not any(relevance[prompt]) for prompt in prompts),
        reasons={reason: reasons[reason] for reason in REASONS},
        **{name: _bootstrap(scores, seed) for name, scores in by_prompt.items()},
    )


def evaluation_to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """For JSON: a number `key` with its `key_interval`; NaN, which JSON lacks, becomes None."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(evaluation):
        value = getattr(evaluation, field.name)
        if isinstance(value, Estimate):
            result[field.name] = _finite(value.value)
            result[f"{field.name}_interval"] = [_finite(value.low), _finite(value.high)]
        else:
            result[field.name] = value
    return result


def _scores(output: Judged, gains: Sequence[float]) -> dict[str, float]:
    """The rank metrics that are defined for this output."""
    defined = []
    if any(gains):
        defined = ["ndcg_at_1", "ndcg_at_k"]
        if len(set(gains)) > 1:
            defined.append("kendall_tau")
    if output.ranking is None:
        return {f"{name}_all": 0.0 for name in defined}
    scores = {}
    # Best first: the first item gets the highest score.
    item_scores = np.empty(len(gains))
    item_scores[np.array(output.ranking) - 1] = np.arange(len(gains), 0, -1)
    for name in defined:
        scores[name] = scores[f"{name}_all"] = _score(name, item_scores, gains)
    return scores


def _score(name: str, item_scores: np.ndarray, gains: Sequence[float]) -> float:
    if name == "kendall_tau":
        return float(stats.kendalltau(item_scores, gains).statistic)
    if len(gains) == 1:
        return 1.0  # scikit-learn refuses lists of one
    k = 1 if name == "ndcg_at_1" else None
    # The scores have no ties.
    return float(ndcg_score([gains], [item_scores], k=k, ignore_ties=True))


def _wilson(num_parsed: int, num_outputs: int) -> Estimate:
    if num_outputs == 0:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    interval = stats.binomtest(num_parsed, num_outputs).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(
        value=num_parsed / num_outputs, low=float(interval.low), high=float(interval.high)
    )


def _bootstrap(scores: Mapping[str, Sequence[float]], seed: int) -> Estimate:
    """Mean over prompts with its percentile interval."""
    if not scores:
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    means = np.array([np.mean(of_prompt) for of_prompt in scores.values()])
    value = float(means.mean())
    if np.ptp(means) == 0:
        return Estimate(value=value, low=value, high=value)
    interval = stats.bootstrap(
        (means,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=200,  # bounds memory at 200 × prompts
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value=value, low=float(interval.low), high=float(interval.high))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
