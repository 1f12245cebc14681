"""The governor: follows p, b and q of every contract class during training, and caps λ.

λ* of a class is `threshold.lambda_star` at its averaged masses. The binding class is the unresolved
one (base mass at most ½) with the smallest λ*. A resolved class only sharpens when λ* is crossed,
so it binds nothing; a class with p ≤ b has no λ*. The cap stays below λ* and below the escape
threshold at the first id, which a prediction takes from the base and the run from the student.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from listopd_ray.cliff.threshold import escape, lambda_star, logit, safe_lam
from listopd_ray.types import CONTRACT_CLASSES, ListopdError

CLASSES = tuple(token_class.name.lower() for token_class in CONTRACT_CLASSES)
FIRST_ID_METRICS = ("cliff/first_log_ratio", "cliff/first_clipped_log_ratio")  # D and I of `escape`
SMALLEST_MASS = 1e-7  # of a float32 mean; masses stay this far from 0 and 1, so logits are finite
NORMAL_95 = 1.959964  # half-width of the 95 % interval in standard errors


@dataclass
class Average:
    """Exponential average whose first readings count fully: after n ≪ 1/(1 − decay), their mean."""

    mean: float = 0.0
    variance: float = 0.0  # of single readings around the mean
    squares: float = 0.0  # sum of the squared weights of the readings; 1/n of n equal ones
    count: int = 0

    def add(self, reading: float, decay: float) -> None:
        self.count += 1
        gain = (1 - decay) / (1 - decay**self.count)
        step = reading - self.mean
        self.mean += gain * step
        self.variance = (1 - gain) * (self.variance + gain * step**2)
        self.squares = (1 - gain) ** 2 * self.squares + gain**2

    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean; None where one reading has all the weight."""
        if self.squares == 1:
            return None
        return NORMAL_95 * math.sqrt(self.variance * self.squares / (1 - self.squares))


class Governor:
    """Caps λ where `caps` says so; measures either way.

    `decay` in [0, 1) is the weight that an average keeps per step, `margin` in [0, 1) the share of
    the threshold's distance from 1 that the cap stays away from it. `predicted` is a threshold that
    holds as long as the run has measured none; None: nothing is known.
    """

    def __init__(
        self, *, clip: float, margin: float, decay: float, caps: bool, predicted: float | None
    ) -> None:
        self._clip = clip
        self._margin = margin
        self._decay = decay
        self._caps = caps
        self._predicted = predicted
        self._averages: dict[str, Average] = {}  # of teacher_, base_, student_ and gap_<class>

    @property
    def binding_class(self) -> str | None:
        found = self._lambda_stars()
        return min(found, key=lambda name: found[name]) if found else None

    def working_lam(self, requested: float) -> float:
        """The λ to train with: `requested`, capped if the governor is on (at 1 as long as neither a
        prediction nor a measurement says more).

        `requested` = inf asks for the cap itself. Raises ListopdError where there is none, because
        the governor is off or λ* is infinite: no finite λ is then the one that was meant.
        """
        lam = requested
        if self._caps:
            bound = self._bound()
            lam = min(requested, 1.0 if bound is None else safe_lam(bound, self._margin))
        if math.isinf(lam):
            raise ListopdError("lam: 'auto' finds no finite λ* to stay below")
        return lam

    def update(self, metrics: dict[str, float], lam: float) -> dict[str, float]:
        """Take in the metrics of one step, trained with `lam`; what is undefined is left out."""
        tails = {}
        for name in CLASSES:
            readings = {
                f"{owner}_{name}": metrics[key]
                for owner in ("teacher", "base", "student")
                if (key := f"cliff/{owner}_mass_{name}") in metrics
            }
            if f"base_{name}" in readings:
                p, b = readings[f"teacher_{name}"], readings[f"base_{name}"]
                readings[f"gap_{name}"] = logit(_inside(p)) - logit(_inside(b))
            for key, reading in readings.items():
                self._averages.setdefault(key, Average()).add(reading, self._decay)
            if f"student_{name}" in self._averages:
                tails[f"cliff/tail_mass_{name}"] = 1 - self._averages[f"student_{name}"].mean
        for key in FIRST_ID_METRICS:
            if key in metrics:
                self._averages.setdefault(key, Average()).add(metrics[key], self._decay)
        found = self._escape()
        escapes = {"cliff/escape": found} if found is not None and math.isfinite(found) else {}
        return tails | escapes | self._lambda_star_metrics(lam)

    def state(self) -> dict[str, Any]:
        return {key: asdict(average) for key, average in self._averages.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self._averages = {key: Average(**fields) for key, fields in state.items()}

    def _masses(self, name: str) -> tuple[float, float]:
        """Averaged p and b of a class."""
        teacher, base = self._averages[f"teacher_{name}"], self._averages[f"base_{name}"]
        return _inside(teacher.mean), _inside(base.mean)

    def _lambda_stars(self) -> dict[str, float]:
        """λ* of every unresolved class that has one."""
        measured = (name for name in CLASSES if f"base_{name}" in self._averages)
        masses = {name: self._masses(name) for name in measured}
        return {
            name: lambda_star(p, b, self._clip)
            for name, (p, b) in masses.items()
            if b <= 0.5 and b < p
        }

    def _escape(self) -> float | None:
        """The escape threshold, None where it was not measured."""
        if not self._averages.keys() >= set(FIRST_ID_METRICS) or math.isinf(self._clip):
            return None
        log_ratio, clipped = (self._averages[key].mean for key in FIRST_ID_METRICS)
        return escape(log_ratio, clipped, self._clip)

    def _bound(self) -> float | None:
        """What λ has to stay below: the smallest finite threshold measured, else the predicted
        one, else ∞ if all that was measured is infinite; None where nothing is known."""
        found = [*self._lambda_stars().values(), self._escape()]
        measured = [threshold for threshold in found if threshold is not None]
        finite = [threshold for threshold in measured if math.isfinite(threshold)]
        return min(finite, default=self._predicted or min(measured, default=None))

    def _lambda_star_metrics(self, lam: float) -> dict[str, float]:
        """λ* of the binding class, its interval (by the spread of the gap), and where λ stands."""
        binding = self.binding_class
        if binding is None or math.isinf(self._clip):
            return {}
        p, b = self._masses(binding)
        star, gap = lambda_star(p, b, self._clip), logit(p) - logit(b)
        metrics = {
            "cliff/lambda_star": star,
            "cliff/drive": (lam - 1) / (star - 1),
            "cliff/headroom": star - lam,
        }
        half = self._averages[f"gap_{binding}"].half_width()
        if half is not None:
            metrics["cliff/lambda_star_low"] = 1 + math.log(self._clip) / (gap + half)
            if half < gap:  # else it reaches up to +∞
                metrics["cliff/lambda_star_high"] = 1 + math.log(self._clip) / (gap - half)
        return metrics


def _inside(mass: float) -> float:
    return min(max(mass, SMALLEST_MASS), 1 - SMALLEST_MASS)
