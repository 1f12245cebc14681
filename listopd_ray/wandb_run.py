"""A run in W&B: the same names and numbers as in its directory, offline where there is no key."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from listopd_ray.config import Config, resolved
from listopd_ray.redact import redacted_text
from listopd_ray.types import ListopdError

TABLE_COLUMNS = ("train/step", "id", "prompt", "completion", "reason", "advantages")
LONGEST_TAG = 64  # characters, of W&B


class WandbRun:
    """One for every run, in the process that drives it. A run that goes on goes on in the same
    place. What W&B has of it already is not sent again, but for what a roll-back learns anew: its
    rows come a second time, since W&B only appends."""

    def __init__(self, config: Config, directory: Path, owner: dict[str, Any]) -> None:
        """`owner`: what makes it this run and no other. Raises ListopdError where W&B refuses."""
        import wandb

        self._wandb, self._config, self._directory = wandb, config, directory
        tracking = config.tracking
        key = repr((str(directory.absolute()), sorted(owner.items(), key=str)))
        self._identity = hashlib.sha256(key.encode()).hexdigest()[:12]
        goes_on = (directory / "metrics.jsonl").exists()
        mode = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        arguments = sys.argv  # W&B keeps them
        sys.argv = list(map(redacted_text, arguments))
        try:
            self._run = wandb.init(
                project=tracking.project,
                group=tracking.group,
                job_type=tracking.job_type,
                name=symbolic_name(config),
                tags=[tag[:LONGEST_TAG] for tag in (config.name, config.extrapolation)],
                id=self._identity,
                resume="allow",
                dir=str(directory),
                mode=mode,  # type: ignore[arg-type]
                config=json.loads(json.dumps(resolved(config))),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, ValueError) as error:
            reason = redacted_text(" ".join(str(error).split()))
            raise ListopdError(f"W&B: {reason} (tracking.wandb=false does without)") from None
        finally:
            sys.argv = arguments
        for axis in ("train/step", "train/tokens"):
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="train/step")
        self._known = self._run.summary.get("train/step", -1) if goes_on else -1
        self._sent = self._known  # W&B's own count of rows, which has to rise over all sittings
        self._pending: dict[str, Any] = {}  # goes with the next row

    def log(self, row: dict[str, Any]) -> None:
        if row["train/step"] > self._known:
            self._known = row["train/step"]
            self._sent = max(self._sent + 1, self._known)
            self._run.log(row | self._pending, step=self._sent)
        self._pending = {}

    def forget_update(self) -> None:
        """It is done again."""
        self._pending = {}

    def roll_back(self, step: int) -> None:
        """What comes after `step` is not what was sent before."""
        self._known = step

    def keep_update(self, row: dict[str, Any]) -> None:
        """Samples as a table, one line a token's advantage; histograms."""
        table = self._wandb.Table(columns=list(TABLE_COLUMNS))
        for sample in row["rollouts"]:
            pairs = zip(sample["tokens"], sample["advantages"], strict=True)
            known = [(token, a) for token, a in pairs if a is not None]
            lines = [f"{a:+.2f}  {json.dumps(token, ensure_ascii=False)}" for token, a in known]
            cells = [sample[name] for name in TABLE_COLUMNS[1:-1]]
            table.add_data(row["train/step"], *cells, "\n".join(lines))
        self._pending = {"samples/rollouts": table} | {
            f"histogram/{name}": self._wandb.Histogram(
                np_histogram=(histogram["counts"], histogram["edges"])
            )
            for name, histogram in row["histograms"].items()
        }

    def finish(self, summary: dict[str, Any]) -> None:
        """The summary; the student where it is asked for."""
        self._run.summary.update(summary)
        if self._config.tracking.artifact:
            name = re.sub(r"[^\w.-]", "-", f"{self._config.name}-{self._identity}")
            student = self._wandb.Artifact(name, type="model", metadata=summary["final"])
            student.add_dir(str(self._directory / "student"))
            self._run.log_artifact(student)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def symbolic_name(config: Config) -> str:
    """`lam=1.30 c=2 s0`, then the form of the update where it is not the plain one, and what the
    run's own name says beyond λ and seed."""
    lam = config.lam
    if not isinstance(lam, str):
        lam = f"{lam:.2f}" if round(lam, 2) == lam else f"{lam:g}"
    parts = [f"lam={lam} c={config.clip:g} s{config.seed}"]
    parts += [config.extrapolation] if config.extrapolation != "plain" else []
    parts += ["governed"] if config.governor.enabled else []
    rest = re.sub(r"(^|-)(lam|seed|s)[\d.]+(?=-|$)", "", config.name).strip("-")
    return " ".join([*parts, rest] if rest and rest not in parts else parts)
