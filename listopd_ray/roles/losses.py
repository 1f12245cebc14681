"""The update: extrapolated, clipped on-policy distillation of sampled tokens. Pure functions.

N completion tokens of any number of rollouts, flat: prompts and padding never get here. Natural
logs (nats). π_T teacher, π_B base, π_θ the student being trained, μ the policy that sampled.

Sources: reward extrapolation λ·log(π_T/π_B) − log(π_θ/π_B) from G-OPD (arXiv 2602.12125), which
`opd_advantages` equals at c = ∞; the clip c on π_T/π_θ from the abstract of arXiv 2605.08737; the
bounded form is this project's own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch


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
    """Per-token advantage [N], detached: extrapolation + imitation.

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
    num_tokens: int,
) -> torch.Tensor:
    """Scalar surrogate −Σ min(r·A, clip(r, 1 ± ε)·A) / num_tokens with r = π_θ/μ.

    `num_tokens` is the token count of the whole update over all micro-batches and ranks, so the
    sum of the parts' losses (and gradients) does not depend on how the batch was split. The
    log-ratio is bounded to ±20 nats before `exp`.
    """
    ratio = (learner_logprobs - sampler_logprobs).clamp(-20.0, 20.0).exp()
    clipped = ratio.clamp(1.0 - ratio_clip, 1.0 + ratio_clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum() / num_tokens
