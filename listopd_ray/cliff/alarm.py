"""The collapse alarm: rings when outputs stop parsing, and earlier where the cause is in view.

The verdict is the strict parse rate, on training rollouts and on evaluation, against the best seen
so far. Past λ* the binding class has lost its restoring force, which two signs show: its tail mass
falls below (1 − p)/c, or the share of its tokens short of the clip, those still pulled back in
proportion, is half of what it was before training (where the student was furthest from the teacher,
so that plain distillation only raises it). Evaluations are not scored: at their steps, too, both
signs are those of the training rollouts. Both are harmless while outputs parse, since a student
may settle past the clip exit; they count once the parse rate is falling too.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from listopd_ray.cliff.governor import CLASSES, Average

HEALTHY_SHARE = 0.9  # of the best parse rate: good enough to roll back to


class Alarm:
    """Rings after `patience` training steps in a row with a fault, or one bad evaluation.

    `parse_share`: share of the best parse rate below which outputs count as collapsed; half-way
    from 1 to there they count as falling. `decay` in [0, 1): weight that the average over training
    batches keeps per step; at 0.7 it remembers about three, so that a collapse within three steps
    is seen three steps later. With fewer than 32 rollouts a step raise `patience`.
    """

    def __init__(
        self, *, clip: float, parse_share: float = 0.5, patience: int = 3, decay: float = 0.7
    ) -> None:
        self._clip = clip
        self._parse_share = parse_share
        self._patience = patience
        self._decay = decay
        self._parse = Average()
        self._best = 0.0  # highest average so far
        self._best_evaluation = 0.0
        self._pending = 0  # training steps in a row with a fault
        self._first_clip: dict[str, float] = {}  # class → clip fraction before training

    @property
    def healthy(self) -> bool:
        """Whether a checkpoint of now is a good one to roll back to."""
        return self._pending == 0 and self._parse.mean >= HEALTHY_SHARE * self._best

    def check(self, metrics: dict[str, float], binding_class: str | None) -> str | None:
        """Take in the metrics of one step; why the alarm rings, in one line, or None."""
        for name in CLASSES:
            if (key := f"loss/clip_fraction_{name}") in metrics:
                self._first_clip.setdefault(name, metrics[key])
        reason = None
        if "contract/parse_rate" in metrics:
            self._parse.add(metrics["contract/parse_rate"], self._decay)
            self._best = max(self._best, self._parse.mean)
            fault = self._fault(metrics, binding_class)
            self._pending = self._pending + 1 if fault else 0
            if self._pending >= self._patience:
                reason = f"{fault} ({self._pending} steps in a row)"
        if "eval/parse_rate" in metrics:
            rate = metrics["eval/parse_rate"]
            self._best_evaluation = max(self._best_evaluation, rate)
            if rate < self._parse_share * self._best_evaluation:
                self._pending = max(self._pending, self._patience)
                reason = f"evaluation parses {rate:.3f}, best was {self._best_evaluation:.3f}"
        return reason

    def state(self) -> dict[str, Any]:
        return {
            "parse": asdict(self._parse),
            "best": self._best,
            "best_evaluation": self._best_evaluation,
            "pending": self._pending,
            "first_clip": dict(self._first_clip),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Also after a roll-back: with the state of that checkpoint, everything since is gone."""
        self._parse = Average(**state["parse"])
        self._best = state["best"]
        self._best_evaluation = state["best_evaluation"]
        self._pending = state["pending"]
        self._first_clip = dict(state["first_clip"])

    def _fault(self, metrics: dict[str, float], binding_class: str | None) -> str | None:
        """What is wrong with this training step."""
        parses = f"training parses {self._parse.mean:.3f}, best was {self._best:.3f}"
        if self._parse.mean < self._parse_share * self._best:
            return parses
        falling = self._parse.mean < (1 + self._parse_share) / 2 * self._best
        sign = _past_the_exit(metrics, binding_class, self._clip, self._first_clip)
        return f"{parses}; {sign}" if falling and sign else None


def _past_the_exit(
    metrics: dict[str, float], name: str | None, clip: float, first_clip: dict[str, float]
) -> str | None:
    """How the binding class shows that the student has left the region of restoring force."""
    if f"cliff/student_mass_{name}" in metrics:
        tail = 1 - metrics[f"cliff/student_mass_{name}"]
        exit_tail = (1 - metrics[f"cliff/teacher_mass_{name}"]) / clip
        if tail < exit_tail:
            return f"{name} tail mass {tail:.3g} below (1-p)/c = {exit_tail:.3g}"
    fraction = metrics.get(f"loss/clip_fraction_{name}")
    if name is not None and fraction is not None and 1 - fraction < (1 - first_clip[name]) / 2:
        return f"{name} clip fraction {fraction:.3f}, first was {first_clip[name]:.3f}"
    return None
