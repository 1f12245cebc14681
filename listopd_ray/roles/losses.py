"""The update: extrapolated, clipped on-policy distillation. Pure functions.

N completion tokens of any number of rollouts, flat: prompts and padding never get here. S tokens of
the teacher's support. Natural logs (nats). π_T teacher, π_B base, π_θ the student being trained, μ
the policy that sampled.

Sources: reward extrapolation λ·log(π_T/π_B) − log(π_θ/π_B) from G-OPD (arXiv 2602.12125), which
`opd_advantages` equals at c = ∞; the clip c on π_T/π_θ from the abstract of arXiv 2605.08737; the
bounded form is this project's own. The support of the teacher's likeliest tokens in the place of
the sampled one: arXiv 2603.25562.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Importance = Literal["clip", "truncate", "gate"]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What every model says of N completion tokens, float32."""

    learner: torch.Tensor  # [N], of the sampled tokens
    sampler: torch.Tensor  # [N]
    teacher: torch.Tensor  # [N]
    base: torch.Tensor | None = None  # [N]; None: there is none
    learner_support: torch.Tensor | None = None  # [N, S], of the teacher's likeliest tokens
    teacher_support: torch.Tensor | None = None  # [N, S]
    base_support: torch.Tensor | None = None  # [N, S]


@dataclass(frozen=True, slots=True)
class Update:
    """The options of an update: keys of the configuration, where they are described."""

    lam: float
    clip: float
    extrapolation: Literal["plain", "bounded"] = "plain"
    delta: float = 0.5
    estimator: Literal["sampled", "topk"] = "sampled"
    importance: Importance = "clip"
    ratio_clip: float = 0.2
    ratio_cap: float = 2.0

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Where π_θ/μ of a token counts as it is."""
        if self.importance == "gate":
            return 1 / self.ratio_cap, self.ratio_cap
        if self.importance == "truncate":
            return 0.0, self.ratio_cap
        if self.estimator == "topk":  # without a ratio
            return 0.0, math.inf
        return 1.0 - self.ratio_clip, 1.0 + self.ratio_clip

    def loss(self, scores: TokenScores, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, a scalar, and the advantages [N] of the sampled tokens, detached.

        The top-k estimator is an expectation under the student as it is now: of the sampled token's
        ratio to its sampler it knows nothing but what `truncate` and `gate` make of it, a weight.
        """
        form = dict(
            lam=self.lam, clip=self.clip, extrapolation=self.extrapolation, delta=self.delta
        )
        weighting = dict(importance=self.importance, ratio_cap=self.ratio_cap)
        learner, sampler = scores.learner, scores.sampler
        advantages = opd_advantages(learner, scores.teacher, scores.base, **form)  # type: ignore[arg-type]
        if self.estimator == "sampled":
            weighting["ratio_clip"] = self.ratio_clip
            loss = opd_loss(learner, sampler, advantages, num_tokens=num_tokens, **weighting)  # type: ignore[arg-type]
            return loss, advantages
        weights = torch.ones_like(learner.detach())
        if self.importance != "clip":
            weights = importance_weights(learner, sampler, **weighting)  # type: ignore[arg-type]
        support = (scores.learner_support, scores.teacher_support, scores.base_support)
        return support_loss(*support, weights, num_tokens=num_tokens, **form), advantages  # type: ignore[arg-type]


def opd_advantages(
    learner_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    base_logprobs: torch.Tensor | None,
    *,
    lam: float,
    clip: float,
    extrapolation: Literal["plain", "bounded"] = "plain",
    delta: float = 0.5,
) -> torch.Tensor:
    """Advantage of every token, [N] or [N, S], detached: extrapolation + imitation.

        imitation     = clip(log π_T − log π_θ, ±log c)
        extrapolation = (λ − 1)·(log π_T − log π_B)            plain
                      = the same, clipped to ±(1 − δ)·log c    bounded

    λ = 1 needs no base (`base_logprobs` None) and is plain on-policy distillation, bit for bit.
    Raises ValueError where λ ≠ 1 comes without base log-probabilities.
    """
    log_clip = math.log(clip)
    imitation = (teacher_logprobs - learner_logprobs.detach()).clamp(-log_clip, log_clip)
    if lam == 1.0:
        return imitation
    if base_logprobs is None:
        raise ValueError(f"lam={lam} needs base log-probabilities; only lam=1 does without")
    drive = (lam - 1.0) * (teacher_logprobs - base_logprobs)
    if extrapolation == "bounded":
        bound = (1.0 - delta) * log_clip
        drive = drive.clamp(-bound, bound)
    return drive + imitation


def opd_loss(
    learner_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    ratio_clip: float,
    importance: Importance = "clip",
    ratio_cap: float = 2.0,
    num_tokens: int,
) -> torch.Tensor:
    """Scalar surrogate −Σ w·A / num_tokens over the sampled tokens, with r = π_θ/μ:

        clip       w·A = min(r·A, clip(r, 1 ± ratio_clip)·A)
        truncate   w = min(r, ratio_cap), no gradient beyond what log π_θ gives: w·A·∇log π_θ
        gate       w = r where 1/ratio_cap ≤ r ≤ ratio_cap, else 0; gradient as above

    `num_tokens` is the token count of the whole update over all micro-batches and ranks, so the
    sum of the parts' losses (and gradients) does not depend on how the batch was split.
    """
    if importance == "clip":
        ratio = importance_ratio(learner_logprobs, sampler_logprobs)
        clipped = ratio.clamp(1.0 - ratio_clip, 1.0 + ratio_clip)
        return -torch.minimum(ratio * advantages, clipped * advantages).sum() / num_tokens
    weights = importance_weights(learner_logprobs, sampler_logprobs, importance, ratio_cap)
    one = (learner_logprobs - learner_logprobs.detach()).exp()  # its gradient is that of the log
    return -(weights * advantages * one).sum() / num_tokens


def support_loss(
    learner_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    base_logprobs: torch.Tensor | None,
    weights: torch.Tensor,
    *,
    lam: float,
    clip: float,
    extrapolation: Literal["plain", "bounded"] = "plain",
    delta: float = 0.5,
    num_tokens: int,
) -> torch.Tensor:
    """Scalar −Σ_t w_t Σ_s π_θ(s)·A(s) / num_tokens over the teacher's support, all [N, S].

    Every distribution is renormalised over the support. At λ = 1 and c = ∞ that is the truncated
    reverse KL, and over the whole vocabulary (S = V) the expectation of `opd_loss` with r = 1.
    `weights` [N] say how much each place counts (`importance_weights`, or ones).
    """
    learner = torch.log_softmax(learner_logprobs, dim=-1)
    teacher = torch.log_softmax(teacher_logprobs, dim=-1)
    base = None if base_logprobs is None else torch.log_softmax(base_logprobs, dim=-1)
    options = dict(lam=lam, clip=clip, extrapolation=extrapolation, delta=delta)
    advantages = opd_advantages(learner, teacher, base, **options)  # type: ignore[arg-type]
    return -(weights * (learner.exp() * advantages).sum(dim=-1)).sum() / num_tokens


def importance_ratio(
    learner_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor
) -> torch.Tensor:
    """r = π_θ/μ [N], its logarithm bounded to ±20 nats before `exp`."""
    return (learner_logprobs - sampler_logprobs).clamp(-20.0, 20.0).exp()


def importance_weights(
    learner_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    importance: Importance,
    ratio_cap: float,
) -> torch.Tensor:
    """w [N], detached, of `truncate` and `gate` (see `opd_loss`)."""
    ratio = importance_ratio(learner_logprobs.detach(), sampler_logprobs)
    if importance == "truncate":
        return ratio.clamp(max=ratio_cap)
    return torch.where((ratio >= 1 / ratio_cap) & (ratio <= ratio_cap), ratio, 0.0)
