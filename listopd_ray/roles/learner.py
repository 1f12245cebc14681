"""The learner: one optimizer step per call on the student, and its weights for everyone else."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from listopd_ray.checkpoint import CorruptCheckpoint, Files, digests, fetched, staged
from listopd_ray.config import Config
from listopd_ray.models import load_model, load_tokenizer, read_files
from listopd_ray.roles.batching import (
    collate,
    collate_rollouts,
    completion_logprobs,
    gather,
    micro_batches,
)
from listopd_ray.roles.losses import opd_advantages, opd_loss
from listopd_ray.roles.publisher import Publisher
from listopd_ray.roles.teacher import Scored
from listopd_ray.types import (
    CONTRACT_CLASSES,
    Histogram,
    Inspection,
    ListopdError,
    ScoredRollout,
    StrPath,
    Weights,
)

# Per-token columns of a batch, and the fields of `ScoredRollout` they come from.
SCORES = {
    "teacher": "teacher_logprobs",
    "teacher_modal": "teacher_modal_logprobs",
    "teacher_unused": "teacher_unused_mass",
    "token_class": "token_classes",
}
BASE_SCORES = {
    "base": "base_logprobs",
    "base_modal": "base_modal_logprobs",
    "base_unused": "base_unused_mass",
}
LOG_RATIO_EDGES = np.linspace(-math.log(4), math.log(4), 42)  # the bin in the middle is around 0


class Learner:
    """Owns the trained student and its AdamW state. `policy_version` counts its updates."""

    def __init__(
        self,
        config: Config,
        *,
        student_path: StrPath,
        canary_ids: np.ndarray,
        sync_directory: Path | None = None,
    ) -> None:
        """`sync_directory`: its own, for the files of its weights; None: tensors alone."""
        self._config = config
        self._device = config.device
        self._dtype = config.learner.dtype
        # Evaluation mode: dropout would make the learner another policy than the sampler's.
        self._model = load_model(student_path, dtype=self._dtype, device=self._device).eval()
        self._tokenizer = load_tokenizer(student_path)
        self._canary_ids = canary_ids
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=config.lr,
            betas=(config.learner.beta1, config.learner.beta2),
            weight_decay=config.learner.weight_decay,
            fused=True,
        )
        self._publisher = Publisher(self._model, config.sync.method, sync_directory, self._dtype)
        self.policy_version = 0
        self._last: dict[str, Any] = {}  # of the last update, for `inspect`

    def step(self, lam: float, lr: float, *scored: Scored) -> dict[str, float]:
        """One update on all rollouts of `scored`; returns its metrics.

        Where loss or gradient is not finite the update is skipped, `train/skipped` is 1, and
        weights and optimizer are those of before the step. So they are where it raises
        ListopdError, because a score is not finite.
        """
        start = time.perf_counter()
        rollouts = [rollout for part in scored for rollout in part.rollouts]
        num_tokens = sum(len(r.rollout.token_ids) for r in rollouts)
        lengths = [len(r.rollout.prompt.token_ids) + len(r.rollout.token_ids) for r in rollouts]
        parts, order = [], list[int]()
        self._optimizer.zero_grad(set_to_none=True)
        for group in micro_batches(lengths, self._config.learner.micro_batch_size):
            order += group
            loss, columns = self._loss([rollouts[index] for index in group], lam, num_tokens)
            loss.backward()
            parts.append(columns)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), self._config.learner.max_grad_norm
        ).item()
        for group_options in self._optimizer.param_groups:
            group_options["lr"] = lr
        loss_sum = sum(part["loss"].item() for part in parts)
        skipped = not (math.isfinite(grad_norm) and math.isfinite(loss_sum))
        if not skipped:
            self._optimizer.step()
        staleness = [self.policy_version - r.rollout.policy_version for r in rollouts]
        self.policy_version += 1
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        measured = _metrics(columns, self._config.clip) | {"loss/grad_norm": grad_norm}
        ends = np.cumsum([len(rollouts[index].rollout.token_ids) for index in order])
        self._last = {
            "advantages": dict(zip(order, np.split(columns["advantage"], ends[:-1]), strict=True)),
            "log_ratio": columns["learner"] - columns["sampler"],
            "staleness": staleness,
        }
        return {
            **{
                name: value
                for name, value in measured.items()
                if not skipped or math.isfinite(value)
            },
            "train/skipped": float(skipped),
            "rollout/staleness": float(np.mean(staleness)),
            "rollout/tokens": float(num_tokens),
            "time/score_s": max(part.seconds for part in scored),
            "time/learn_s": time.perf_counter() - start,
        }

    def inspect(self) -> Inspection:
        """Of the last update: the advantages of its first `evaluation.num_samples` rollouts, and
        how importance ratio (π_θ/μ, of tokens; the outermost bins are open) and staleness (of
        rollouts) are distributed."""
        last, shown = self._last, range(self._config.evaluation.num_samples)
        log_ratio = last["log_ratio"][np.isfinite(last["log_ratio"])]
        inside = np.clip(log_ratio, LOG_RATIO_EDGES[0], LOG_RATIO_EDGES[-1])
        counts, _ = np.histogram(inside, LOG_RATIO_EDGES)
        stale = np.bincount(last["staleness"])
        return Inspection(
            advantages=[last["advantages"][n] for n in shown if n in last["advantages"]],
            histograms={
                "loss/importance_ratio": Histogram(
                    counts=counts.tolist(), edges=np.exp(LOG_RATIO_EDGES).tolist()
                ),
                "rollout/staleness": Histogram(
                    counts=stale.tolist(), edges=(np.arange(len(stale) + 1) - 0.5).tolist()
                ),
            },
        )

    def check_scores(self, *scored: Scored) -> dict[str, float]:
        """The start-up gate: `scored` holds rollouts of the untrained student, scored with the
        student in the teacher's place.

        The sampler's log-probabilities must be the learner's, and so must the teacher actor's: a
        student that is its own teacher has a reverse KL of 0. Raises ListopdError where any differs
        by more than `sync.tolerance`.
        """
        rollouts = [rollout for part in scored for rollout in part.rollouts]
        batch = collate_rollouts([r.rollout for r in rollouts], self._device)
        with torch.inference_mode():
            learner = gather(completion_logprobs(self._model, batch), batch.token_ids).cpu().numpy()
        sampler = np.concatenate([r.rollout.sampler_logprobs for r in rollouts])
        metrics = {}
        for role, logprobs in (
            ("rollout", sampler),
            ("teacher", _concatenate(rollouts, "teacher_logprobs")),
        ):
            metrics[f"gate/{role}_max"] = largest = float(np.abs(logprobs - learner).max())
            if not largest <= self._config.sync.tolerance:  # NaN fails too
                raise ListopdError(
                    f"start-up gate: the {role} actor's log-probabilities of the student differ "
                    f"from the learner's by {largest:.2g} nats "
                    f"(sync.tolerance={self._config.sync.tolerance:g})"
                )
        return metrics

    @torch.inference_mode()
    def publish_weights(self) -> Weights:
        start = time.perf_counter()
        batch = collate([self._canary_ids[:1]], [self._canary_ids[1:]], self._device)
        canary = gather(completion_logprobs(self._model, batch), batch.token_ids)
        return self._publisher.publish(
            self.policy_version, self._canary_ids, canary.cpu().numpy(), since=start
        )

    def close(self) -> None:
        """Remove the files of its weights."""
        self._publisher.close()

    def save(self, url: str) -> Files:
        """Weights, optimizer state and version; the digests of the files. There is no other state:
        a sample's noise is seeded by its name, and nothing here draws any."""
        with staged(url) as directory:
            self.export(str(directory / "student"))
            state: dict[str, torch.Tensor] = {}
            for index, slots in self._optimizer.state_dict()["state"].items():
                state |= {f"{index}.{slot}": value for slot, value in slots.items()}
            save_file(state, directory / "optimizer.safetensors")
            version = json.dumps({"policy_version": self.policy_version})
            (directory / "learner.json").write_text(version)
            return digests(directory)

    def restore(self, url: str, files: Files) -> None:
        """What `save` wrote, in place; raises CorruptCheckpoint, and changes nothing, where a file
        is not what it was."""
        with fetched(url, files) as directory:
            try:
                saved = load_model(directory / "student", dtype=self._dtype, device=self._device)
            except ListopdError as error:  # written as it is, and yet no model
                raise CorruptCheckpoint(str(error)) from None
            self._model.load_state_dict(saved.state_dict())
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in load_file(directory / "optimizer.safetensors").items():
                index, slot = name.split(".")
                slots.setdefault(int(index), {})[slot] = value
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": slots, "param_groups": groups})
            learner = json.loads((directory / "learner.json").read_text())
            self.policy_version = learner["policy_version"]

    def export(self, directory: str) -> None:
        """The student as a Hugging Face directory."""
        self._model.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)

    def exported(self) -> dict[str, bytes]:
        """The files of `export`, for another machine."""
        with TemporaryDirectory() as directory:
            self.export(directory)
            return read_files(directory)

    def _loss(
        self, rollouts: Sequence[ScoredRollout], lam: float, num_tokens: int
    ) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """The micro-batch's share of the loss, and per-token columns [n] for the metrics."""
        batch = collate_rollouts([r.rollout for r in rollouts], self._device)
        columns = {name: _concatenate(rollouts, field) for name, field in SCORES.items()}
        columns["sampler"] = np.concatenate([r.rollout.sampler_logprobs for r in rollouts])
        if rollouts[0].base_logprobs is not None:
            columns |= {name: _concatenate(rollouts, field) for name, field in BASE_SCORES.items()}
        for name in ("teacher", "sampler", "base", "teacher_modal", "base_modal"):
            if name in columns and not np.isfinite(columns[name]).all():  # `admit` let it through
                raise ListopdError(f"update {self.policy_version}: {name} scores are not finite")
        on_device = {
            name: torch.from_numpy(columns[name]).to(self._device)
            for name in ("teacher", "sampler", "base")
            if name in columns
        }
        logprobs = completion_logprobs(self._model, batch)
        learner = gather(logprobs, batch.token_ids)
        advantages = opd_advantages(
            learner,
            on_device["teacher"],
            on_device.get("base"),
            lam=lam,
            clip=self._config.clip,
            extrapolation=self._config.extrapolation,
            delta=self._config.delta,
        )
        loss = opd_loss(
            learner,
            on_device["sampler"],
            advantages,
            ratio_clip=self._config.ratio_clip,
            num_tokens=num_tokens,
        )
        modal_ids = torch.from_numpy(np.concatenate([r.modal_ids for r in rollouts]))
        student_modal = gather(logprobs.detach(), modal_ids.long().to(self._device))
        columns["learner"] = learner.detach().cpu().numpy()
        columns["advantage"] = advantages.cpu().numpy()
        columns["student_modal"] = student_modal.cpu().numpy()
        columns["is_first_id"] = np.concatenate([_first_id(r) for r in rollouts])
        columns["loss"] = np.full(1, loss.item(), dtype=np.float64)
        return loss, columns


def _first_id(rollout: ScoredRollout) -> np.ndarray:
    """[T] bool: where the first id of the answer is due."""
    is_due = ~np.isnan(rollout.teacher_unused_mass)
    return is_due & (np.cumsum(is_due) == 1)


def _concatenate(rollouts: Sequence[ScoredRollout], field: str) -> np.ndarray:
    return np.concatenate([getattr(rollout, field) for rollout in rollouts])


def _metrics(columns: dict[str, np.ndarray], clip: float) -> dict[str, float]:
    """Scalars of one update from its per-token columns."""
    gap = columns["teacher"] - columns["learner"]
    mismatch = columns["learner"] - columns["sampler"]
    ratio = np.exp(mismatch)
    metrics: dict[str, Any] = {
        "loss/policy": columns["loss"].sum(),
        "loss/advantage": columns["advantage"].mean(),
        "kl/reverse": -gap.mean(),
        "kl/mismatch": -mismatch.mean(),
        "kl/mismatch_max": np.abs(mismatch).max(),
        "loss/clip_fraction": (np.abs(gap) >= math.log(clip)).mean(),
        "loss/importance_ratio_max": ratio.max(),
        "loss/effective_sample_size": _effective_sample_size(ratio),
    }
    metrics |= _class_metrics(columns, gap, ratio, math.log(clip))
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
