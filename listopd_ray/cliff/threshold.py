"""Where extrapolation runs away: the cliff from three measured numbers. Pure functions of floats.

p, b, q: mass in [0, 1] that teacher, base (the frozen warm start) and student put on the teacher's
modal class at a contract position. c ≥ 1: clip on the ratio π_T/π_θ. λ ≥ 0: extrapolation, 1 = the
teacher itself. Natural logs; Δ = logit p − logit b.

Derived in this project from the three inputs (p, b, c) that arXiv 2605.08737 names; its own closed
form is not public. A position is reduced to two classes, modal and rest. The expected update of
`roles/losses.py` over the student's own tokens, with a small step, moves z = logit q by

    dz/ds = q(1 − q)·[(λ − 1)Δ − R(q)]
    R(q)  = clip(log((1 − p)/(1 − q)), ±log c) − clip(log(p/q), ±log c)

so a position settles where the drive (λ − 1)Δ meets the restoring force R, at most 2·log c. s is
time in units of learning rate × updates. Beyond two classes the masses at rest stay exact where
teacher and base spread the rest alike. Where p < b, λ > 1 leads away from the class: `reversed_…`.

Every function raises ValueError naming an argument that is NaN or out of range.
"""

from __future__ import annotations

import math

_LARGEST = math.nextafter(math.inf, 0.0)
_ABOVE_ONE = math.nextafter(1.0, 2.0)


def _check(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must lie in [{low}, {high}]")


def _gap(p: float, b: float) -> float:
    """Δ, 0 where p = b even at masses 0 and 1."""
    _check(0.0, 1.0, p=p, b=b)
    return 0.0 if p == b else logit(p) - logit(b)


def _forward_gap(p: float, b: float, c: float) -> float:
    gap = _gap(p, b)
    _check(1.0, math.inf, c=c)
    if p < b:
        raise ValueError(f"p={p} < b={b}: λ > 1 leads away from the class; use `reversed_onset`")
    return gap


def _reversed_gap(p: float, b: float) -> float:
    gap = -_gap(p, b)
    if p >= b:
        raise ValueError(f"p={p} >= b={b}: not reversed; use `lambda_star`")
    return gap


def _drive(p: float, b: float, lam: float) -> float:
    gap = _gap(p, b)
    _check(0.0, _LARGEST, lam=lam)
    return 0.0 if lam == 1.0 else (lam - 1.0) * gap


def _exit_force(p: float, c: float) -> float:
    """R at the first q > p where a ratio reaches the clip: the rest's, at 1 − q = (1 − p)/c, for
    p ≥ 1/(1 + c), the modal one's, at q = c·p, below."""
    rest = math.log1p((c - 1.0) / p)
    return min(rest, math.log(c) + math.log1p(-p) - math.log1p(-c * p)) if c * p < 1.0 else rest


def _largest_force(log_mass: float, c: float) -> float:
    """Supremum of R towards the class on which the teacher puts exp(`log_mass`)."""
    return math.log(c) + min(-log_mass, math.log(c))


def logit(mass: float) -> float:
    """log(mass/(1 − mass)) in nats; −∞ at 0, +∞ at 1."""
    _check(0.0, 1.0, mass=mass)
    if mass in (0.0, 1.0):
        return math.inf if mass else -math.inf
    return math.log(mass) - math.log1p(-mass)


# Three values of λ, in this order, for p ≥ b (else ValueError). +∞ where p = b (no drive) or c = ∞
# (no clip), even at p = 1; otherwise 1 where c = 1, p = 1 or b = 0.


def lambda_star(p: float, b: float, c: float) -> float:
    """λ* = 1 + log c/Δ: the drive equals the saturated term of the rest alone. The predictor.

    Exact for p → 1; otherwise below `clip_exit`, by less than 1 % for p ≥ 0.95, b ≤ ½, c ≤ 10.
    """
    gap = _forward_gap(p, b, c)
    return math.inf if gap == 0.0 or math.isinf(c) else 1.0 + math.log(c) / gap


def clip_exit(p: float, b: float, c: float) -> float:
    """λ at which the unclipped fixed point reaches the clip on either ratio. Exact."""
    gap = _forward_gap(p, b, c)
    return math.inf if gap == 0.0 or math.isinf(c) else 1.0 + _exit_force(p, c) / gap


def runaway(p: float, b: float, c: float) -> float:
    """λ = 1 + [log c + min(log 1/p, log c)]/Δ, from which nothing balances the drive. Exact."""
    gap = _forward_gap(p, b, c)
    if gap == 0.0 or math.isinf(c):
        return math.inf
    return 1.0 + _largest_force(math.log(p), c) / gap


# Where a position settles; any order of p and b.


def fixed_point(p: float, b: float, lam: float) -> float:
    """q with logit q = λ·logit p + (1 − λ)·logit b: R = drive while neither ratio is clipped.

    Raises ValueError where 0 < λ < 1 and of p and b one is 0, the other 1.
    """
    _check(0.0, 1.0, p=p, b=b)
    _check(0.0, _LARGEST, lam=lam)
    if p == b or lam in (0.0, 1.0):
        return p if lam else b
    z = lam * logit(p) + (1.0 - lam) * logit(b)
    if math.isnan(z):
        raise ValueError(f"p={p} and b={b} have no mixture at lam={lam}")
    small = math.exp(-abs(z))
    return (1.0 if z >= 0 else small) / (1.0 + small)


def settled_mass(p: float, b: float, c: float, lam: float) -> float:
    """q with R(q) = drive under the clip: `fixed_point` up to the clip exit, 1 from the runaway on.

    With l = log c and q > p, R is the least of logit q − logit p, l + log(q/p),
    l + log((1 − p)/(1 − q)) and 2l. The first three rise with q, so below the runaway the root is
    the largest of theirs: between exit and runaway p·exp(drive − l) for p ≥ 1/(1 + c), for smaller
    p the third, 1 − (1 − p)·exp(l − drive). A negative drive (λ < 1, or p < b) mirrors this, to 0.
    """
    drive = _drive(p, b, lam)
    _check(1.0, math.inf, c=c)
    if drive == 0.0 or math.isinf(c):
        return fixed_point(p, b, lam)
    if math.isinf(drive):
        return 1.0 if drive > 0 else 0.0
    free, factor = fixed_point(p, b, lam), math.exp(abs(drive) - math.log(c))
    if drive > 0:
        if drive >= _largest_force(math.log(p), c):
            return 1.0
        return min(1.0, max(free, p * factor, 1.0 - (1.0 - p) / factor))
    if -drive >= _largest_force(math.log1p(-p), c):
        return 0.0
    return max(0.0, min(free, 1.0 - (1.0 - p) * factor, p / factor))


def is_clip_safe(p: float, b: float, c: float, lam: float) -> bool:
    """Whether no ratio is clipped where the position settles: λ ≤ `clip_exit` for p ≥ b, λ ≥ 1."""
    drive = _drive(p, b, lam)
    _check(1.0, math.inf, c=c)
    if drive == 0.0 or math.isinf(c):
        return True
    return math.isfinite(drive) and abs(drive) <= _exit_force(p if drive > 0 else 1.0 - p, c)


def clip_for(p: float, b: float, lam: float) -> float:
    """The smallest c with `lambda_star` ≥ λ, exp((λ − 1)Δ); 1 for λ ≤ 1. Needs p ≥ b."""
    _forward_gap(p, b, 1.0)
    drive = _drive(p, b, lam)
    return math.exp(max(drive, 0.0)) if drive < math.log(_LARGEST) else math.inf


def safe_lam(lambda_star: float, margin: float) -> float:
    """1 + (1 − margin)(λ* − 1): the share `margin` ∈ [0, 1] of the way to λ* ≥ 1 stays unused."""
    _check(1.0, math.inf, lambda_star=lambda_star)
    _check(0.0, 1.0, margin=margin)
    return 1.0 if margin == 1.0 else 1.0 + (1.0 - margin) * (lambda_star - 1.0)


# Finite budget and calibration.


def time_to_leave(p: float, b: float, c: float, lam: float, break_logit: float) -> float:
    """s to run from the clip exit to log-odds `break_logit`: [F(z_break) − F(z_exit)]/κ.

    F(z) = e^z − e^−z + 2z is the integral of 1/(q(1 − q)), κ = (λ − λ*)Δ the net drive. Assumes R
    stays at log c, as for p → 1: it exceeds that by log(q/p), so this is too short by a factor of
    κ/(κ − log 1/p) at most. +∞ for λ ≤ λ*, 0 where the exit lies beyond `break_logit`. Needs p ≥ b.
    """
    _check(-math.inf, math.inf, break_logit=break_logit)
    drive = _drive(p, b, lam)
    if lam <= lambda_star(p, b, c):
        return math.inf
    start = logit(p) + _exit_force(p, c)
    if break_logit <= start or break_logit > math.log(_LARGEST):
        return 0.0 if break_logit <= start else math.inf
    leave, enter = (2.0 * math.sinh(z) + 2.0 * z for z in (break_logit, start))
    return (leave - enter) / (drive - math.log(c))


def rescale_onset(lambda_star: float, onset: float, num_steps: float, to_steps: float) -> float:
    """The onset at `to_steps` updates from that at `num_steps`: λ* + (onset − λ*)·N/N′.

    `time_to_leave` goes as 1/(λ − λ*); assumes progress in proportion to the number of updates.
    """
    _check(1.0, _LARGEST, lambda_star=lambda_star, onset=onset)
    _check(math.nextafter(0.0, 1.0), _LARGEST, num_steps=num_steps, to_steps=to_steps)
    return lambda_star + (onset - lambda_star) * num_steps / to_steps


def effective_gap(onset: float, c: float) -> float:
    """The Δ that an onset > 1 measured at clip c stands for, log c/(onset − 1); 1 < c < ∞."""
    _check(_ABOVE_ONE, _LARGEST, onset=onset, c=c)
    return math.log(c) / (onset - 1.0)


def calibrated_lambda_star(onset: float, c0: float, c: float) -> float:
    """λ* at clip c ≥ 1 from an onset ≥ 1 measured at c0: 1 + log c/`effective_gap`(onset, c0).

    Assumes a Δ independent of the clip, and the same budget.
    """
    _check(1.0, _LARGEST, onset=onset)
    _check(_ABOVE_ONE, _LARGEST, c0=c0)
    _check(1.0, math.inf, c=c)
    return 1.0 if onset == 1.0 else 1.0 + math.log(c) / effective_gap(onset, c0)


def escape(log_ratio: float, clipped_log_ratio: float, c: float) -> float:
    """λ = 1 + (log c + I)/(−D) above which nothing holds the student to the tokens of a class.

    D = `log_ratio`, mean of log(π_T/π_B) over tokens that the student samples where the class is
    due; I = `clipped_log_ratio`, mean of the same clipped to ±log c, in [−log c, log c]. The mean
    advantage there is I + (λ − 1)·D, and a softmax shifts mass to whatever has more. A token
    outside the contract that teacher and base find equally (un)likely has no drive, and imitation
    can hold it down by no more than −log c: it gains as soon as the mean advantage is below that.
    Takes the student for the base, as it is where it cannot learn what the teacher knows. Unlike
    `lambda_star` it sees that a teacher which is sure in every single case may look unsure on
    average: D falls with its sharpness, the mean mass p does not. ∞ where D ≥ 0. Of this project.
    """
    _check(1.0, _LARGEST, c=c)
    _check(-math.inf, math.inf, log_ratio=log_ratio)
    bound = math.log(c)
    _check(-bound * (1 + 1e-6), bound * (1 + 1e-6), clipped_log_ratio=clipped_log_ratio)
    if log_ratio >= 0.0:
        return math.inf
    return 1.0 + max(0.0, bound + clipped_log_ratio) / -log_ratio


# p < b (else ValueError): the teacher obeys the contract less than the warm start.


def reversed_mass(p: float, b: float, lam: float) -> float:
    """`fixed_point`, falling with λ; exact down to the clip, at q = max(1 − c(1 − p), p/c)."""
    _reversed_gap(p, b)
    return fixed_point(p, b, lam)


def reversed_runaway(p: float, b: float, c: float) -> float:
    """λ = 1 + [log c + min(log 1/(1 − p), log c)]/|Δ|, from which q runs to 0. Exact."""
    gap = _reversed_gap(p, b)
    _check(1.0, math.inf, c=c)
    if gap == 0.0 or math.isinf(c):
        return math.inf
    return 1.0 + _largest_force(math.log1p(-p), c) / gap


def reversed_onset(
    p: float, b: float, num_positions: float, floor: float, c: float = math.inf
) -> float:
    """λ at which an output of n such positions, each right with mass q, parses at q**n = floor.

    Assumes independent positions. Unclipped by default; given c, exact also beyond the clip, where
    q falls faster, and at most `reversed_runaway`. 0 where every λ parses no better than `floor`.
    """
    gap = _reversed_gap(p, b)
    _check(1.0, _LARGEST, num_positions=num_positions)
    _check(0.0, 1.0, floor=floor)
    _check(1.0, math.inf, c=c)
    target = floor ** (1.0 / num_positions)
    if target == 1.0 or p == 0.0:
        return 0.0
    if gap == 0.0 or b == 1.0:
        return 1.0 if b == 1.0 else math.inf
    modal = math.log(p) - math.log(target) if target else math.inf
    rest = math.log1p(-target) - math.log1p(-p)
    force = sum(max(-math.log(c), min(math.log(c), term)) for term in (modal, rest))
    return max(0.0, 1.0 + force / gap)


# Bounded extrapolation, each token's drive clipped to ±(1 − δ)·log c; 1 < c < ∞.


def smallest_bounded_delta(p: float, c: float) -> float:
    """The δ ∈ [0, ½] above which a position settles for every λ and b.

    The drive is at most 2(1 − δ)·log c, reached at large λ for every b ≠ p; R at most log c +
    min(log 1/p, log c) upwards (b < p), log c + min(log 1/(1 − p), log c) downwards (b > p). So
    δ > 0 and max(p, 1 − p) < c^−(1 − 2δ). At p = 0 and 1 the limit, ½.
    """
    _check(0.0, 1.0, p=p)
    _check(_ABOVE_ONE, _LARGEST, c=c)
    return max(0.0, 0.5 + 0.5 * math.log(max(p, 1.0 - p)) / math.log(c))


def bounded_has_fixed_point(p: float, c: float, delta: float) -> bool:
    """Whether a position settles whatever λ and b; for δ ≥ ½ always, and inside the clip."""
    _check(0.0, 1.0, delta=delta)
    return delta > smallest_bounded_delta(p, c) or delta >= 0.5
