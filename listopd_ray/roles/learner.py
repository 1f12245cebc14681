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
from listopd_ray.config import Config, learner_scores_base
from listopd_ray.models import end_ids, read_files
from listopd_ray.roles.batching import (
    Batch,
    collate,
    collate_rollouts,
    micro_batches,
    sequence_lengths,
)
from listopd_ray.roles.losses import TokenScores, Update
from listopd_ray.roles.optimizer_state import optimizer_tensors, restore_optimizer
from listopd_ray.roles.publisher import Publisher
from listopd_ray.roles.ranks import Ranks, whole
from listopd_ray.roles.scoring import Contract
from listopd_ray.roles.student import Student
from listopd_ray.roles.teacher import Scored
from listopd_ray.roles.update_metrics import update_metrics
from listopd_ray.types import Histogram, Inspection, ListopdError, ScoredRollout, StrPath, Weights

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
SUPPORT = {"teacher_support": "support_logprobs", "base_support": "base_support_logprobs"}
LOG_RATIO_EDGES = np.linspace(-math.log(4), math.log(4), 42)  # the bin in the middle is around 0


class Learner:
    """Owns the trained student and its AdamW state. `policy_version` counts its updates.

    One of `ranks`, perhaps: then all are called alike with the same arguments, each takes its share
    of a batch, and what rank 0 returns is true of the whole.
    """

    def __init__(
        self,
        config: Config,
        *,
        student_path: StrPath,
        canary_ids: np.ndarray,
        sync_directory: Path | None = None,
        rank: int = 0,
        meeting_point: str = "",
    ) -> None:
        """`sync_directory`: see `Publisher`; `meeting_point`: of the ranks, see `Ranks.join`."""
        self._config = config
        self._device = config.device
        self._ranks = Ranks.join(rank, config.learner.num_ranks, meeting_point, config.device)
        self._student = Student(student_path, config, self._ranks)
        self._publisher = Publisher(
            self._student, config.sync.method, sync_directory, is_first=rank == 0
        )
        tokenizer = self._student.tokenizer
        self._contract = Contract(tokenizer, end_ids(student_path, tokenizer))
        self._canary_ids = canary_ids
        self._optimizer = torch.optim.AdamW(
            self._student.trained(),
            lr=config.lr,
            betas=(config.learner.beta1, config.learner.beta2),
            weight_decay=config.learner.weight_decay,
            fused=True,
        )
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
        self._check_finite(rollouts)  # in every rank alike: none is left waiting
        num_tokens = sum(len(r.rollout.token_ids) for r in rollouts)
        update = self._update(lam)
        self._optimizer.zero_grad(set_to_none=True)
        parts, order = [], list[int]()
        for group in self._groups(rollouts):
            # Sharded ranks wait for each other in every pass: one with nothing left counts nothing.
            loss, columns = self._loss([rollouts[i] for i in group or [0]], update, num_tokens)
            (loss if group else loss * 0.0).backward()
            if group:
                order += group
                parts.append(columns)
        self._student.finish_gradients()
        grad_norm = whole(
            torch.nn.utils.clip_grad_norm_(
                self._student.trained(), self._config.learner.max_grad_norm
            )
        ).item()
        for group_options in self._optimizer.param_groups:
            group_options["lr"] = lr
        gathered = self._ranks.gathered((order, parts))
        order = [index for indices, _ in gathered for index in indices]
        parts = [columns for _, of_rank in gathered for columns in of_rank]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        skipped = not (math.isfinite(grad_norm) and math.isfinite(columns["loss"].sum()))
        if not skipped:
            self._optimizer.step()
        staleness = [self.policy_version - r.rollout.policy_version for r in rollouts]
        self.policy_version += 1
        measured = update_metrics(columns, update) | {"loss/grad_norm": grad_norm}
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

    @torch.no_grad()
    def check_scores(self, *scored: Scored) -> dict[str, float]:
        """The start-up gate: `scored` holds rollouts of the untrained student, scored with the
        student in the teacher's place.

        The sampler's log-probabilities must be the learner's, and so must the teacher actor's: a
        student that is its own teacher has a reverse KL of 0. Raises ListopdError where any differs
        by more than `sync.tolerance`.
        """
        rollouts = [rollout for part in scored for rollout in part.rollouts]
        batch = self._batch(rollouts)
        learner = self._student.logprobs(batch, batch.token_ids[:, None])[:, 0].cpu().numpy()
        sampler = np.concatenate([r.rollout.sampler_logprobs for r in rollouts])
        metrics = {}
        for role, logprobs in (
            ("rollout", sampler),
            ("teacher", _joined(rollouts, "teacher_logprobs")),
        ):
            metrics[f"gate/{role}_max"] = largest = float(np.abs(logprobs - learner).max())
            if not largest <= self._config.sync.tolerance:  # NaN fails too
                raise ListopdError(
                    f"start-up gate: the {role} actor's log-probabilities of the student differ "
                    f"from the learner's by {largest:.2g} nats "
                    f"(sync.tolerance={self._config.sync.tolerance:g})"
                )
        return metrics

    @torch.no_grad()
    def publish_weights(self) -> Weights | None:
        """The weights for the rollout workers, from rank 0."""
        start = time.perf_counter()
        batch = collate([self._canary_ids[:1]], [self._canary_ids[1:]], self._device)
        canary = self._student.logprobs(batch, batch.token_ids[:, None])[:, 0]
        return self._publisher.publish(
            self.policy_version, self._canary_ids, canary.cpu().numpy(), since=start
        )

    def close(self) -> None:
        """Remove the files of its weights."""
        self._publisher.close()

    def save(self, url: str) -> Files | None:
        """Weights, optimizer and version; the digests of the files, from rank 0. There is no other
        state: a sample's noise is seeded by its name, and nothing here draws any."""
        weights = self._student.state()
        optimizer = self._ranks.collected(optimizer_tensors(self._optimizer))
        if self._ranks.rank:
            return None
        with staged(url) as directory:
            self._student.write_state(directory, weights)
            save_file(optimizer, directory / "optimizer.safetensors")
            version = json.dumps({"policy_version": self.policy_version})
            (directory / "learner.json").write_text(version)
            return digests(directory)

    def restore(self, url: str, files: Files) -> None:
        """What `save` wrote, in place; raises CorruptCheckpoint, and changes nothing, where a file
        is not what it was."""
        with fetched(url, files) as directory:
            try:
                self._student.restore(directory)
            except ListopdError as error:  # written as it is, and yet no model
                raise CorruptCheckpoint(str(error)) from None
            restore_optimizer(self._optimizer, load_file(directory / "optimizer.safetensors"))
            learner = json.loads((directory / "learner.json").read_text())
            self.policy_version = learner["policy_version"]

    def exported(self) -> dict[str, dict[str, bytes]] | None:
        """The student as the files of a Hugging Face directory ("student") and, where it has one,
        its adapter as those of a PEFT directory ("adapter"), for another machine; from rank 0."""
        student = self._student
        weights, adapter = student.weights(), student.adapter() if student.has_adapter else None
        if self._ranks.rank:
            return None
        with TemporaryDirectory() as directory:
            student.write(Path(directory, "student"), weights)
            if adapter is not None:
                student.write_adapter(Path(directory, "adapter"), adapter)
            return {path.name: read_files(str(path)) for path in Path(directory).iterdir()}

    def _groups(self, rollouts: Sequence[ScoredRollout]) -> list[list[int]]:
        """This rank's micro-batches, indices into `rollouts`: of like length, and as many as every
        other rank has; an empty one where it has fewer."""
        share_prompts = self._student.can_share_prompts
        lengths = sequence_lengths([r.rollout for r in rollouts], share_prompts=share_prompts)
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        config, count = self._config.learner, self._ranks.count
        split = []
        for rank in range(count):
            share = order[rank::count]
            groups = micro_batches(
                [lengths[i] for i in share], config.micro_batch_size, config.micro_batch_tokens
            )
            split.append([[share[position] for position in group] for group in groups])
        rounds = max(map(len, split))
        mine = split[self._ranks.rank]
        return mine + [[]] * (rounds - len(mine))

    def _batch(self, rollouts: Sequence[ScoredRollout]) -> Batch:
        share_prompts = self._student.can_share_prompts
        return collate_rollouts(
            [r.rollout for r in rollouts], self._device, share_prompts=share_prompts
        )

    def _loss(
        self, rollouts: Sequence[ScoredRollout], update: Update, num_tokens: int
    ) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """The micro-batch's share of the loss, and per-token columns [n] for the metrics."""
        batch = self._batch(rollouts)
        columns = _columns(rollouts, SCORES | BASE_SCORES)
        columns["sampler"] = np.concatenate([r.rollout.sampler_logprobs for r in rollouts])
        support = {}
        asked = [batch.token_ids[:, None], self._on_device(_joined(rollouts, "modal_ids")[:, None])]
        if self._config.estimator == "topk":
            support = _columns(rollouts, SUPPORT)
            asked.append(self._on_device(_joined(rollouts, "support_ids")))
        ids = torch.cat([part.long() for part in asked], dim=1)
        logprobs = self._student.logprobs(batch, ids)
        if learner_scores_base(self._config):
            base = self._base_columns(batch, ids, rollouts)
            support |= {"base_support": base.pop("base_support")} if support else {}
            columns |= base
        given = {name: columns[name] for name in ("teacher", "sampler", "base") if name in columns}
        scores = TokenScores(
            learner=logprobs[:, 0],
            learner_support=logprobs[:, 2:] if support else None,
            **{name: self._on_device(column) for name, column in (given | support).items()},
        )
        loss, advantages = update.loss(scores, num_tokens)
        columns["learner"] = logprobs[:, 0].detach().cpu().numpy()
        columns["advantage"] = advantages.cpu().numpy()
        columns["student_modal"] = logprobs[:, 1].detach().cpu().numpy()
        columns["is_first_id"] = _first_ids(rollouts, columns)
        columns["loss"] = np.full(1, loss.item(), dtype=np.float64)
        return loss, columns

    def _base_columns(
        self, batch: Batch, ids: torch.Tensor, rollouts: Sequence[ScoredRollout]
    ) -> dict[str, np.ndarray]:
        """The base's columns by the student without its adapter; `ids` [N, 2 + S]: sampled, modal,
        support."""
        places = self._contract.places([r.rollout for r in rollouts])
        starts = np.zeros((len(ids), places.starts.shape[1]), dtype=np.int64)
        starts[places.due] = places.starts.clip(min=0)
        asked = torch.cat([ids, self._on_device(starts)], dim=1)
        logprobs = self._student.base_logprobs(batch, asked).cpu().numpy()
        base, unused = np.split(logprobs, [ids.shape[1]], axis=1)
        mass = np.full(len(ids), np.nan, dtype=np.float32)
        mass[places.due] = (np.exp(unused[places.due]) * (places.starts >= 0)).sum(axis=1)
        return {
            "base": base[:, 0],
            "base_modal": base[:, 1],
            "base_support": base[:, 2:],
            "base_unused": mass,
        }

    def _update(self, lam: float) -> Update:
        config = self._config
        return Update(
            lam=lam,
            clip=config.clip,
            extrapolation=config.extrapolation,
            delta=config.delta,
            estimator=config.estimator,
            importance=config.importance,
            ratio_clip=config.ratio_clip,
            ratio_cap=config.ratio_cap,
        )

    def _on_device(self, column: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(column).to(self._device)

    def _check_finite(self, rollouts: Sequence[ScoredRollout]) -> None:
        """Raises ListopdError where `admit` let a score through that is not."""
        columns = _columns(rollouts, SCORES | BASE_SCORES | SUPPORT)
        columns["sampler"] = np.concatenate([r.rollout.sampler_logprobs for r in rollouts])
        for name in ("teacher", "sampler", "base", "teacher_modal", "base_modal", *SUPPORT):
            if name in columns and not np.isfinite(columns[name]).all():
                raise ListopdError(f"update {self.policy_version}: {name} scores are not finite")


def _first_ids(rollouts: Sequence[ScoredRollout], columns: dict[str, np.ndarray]) -> np.ndarray:
    """[n] bool: where the first id of an answer is due, as far as base or teacher say."""
    is_due = ~np.isnan(columns.get("base_unused", columns["teacher_unused"]))
    ends = np.cumsum([len(r.rollout.token_ids) for r in rollouts])
    return np.concatenate([d & (np.cumsum(d) == 1) for d in np.split(is_due, ends[:-1])])


def _columns(rollouts: Sequence[ScoredRollout], fields: dict[str, str]) -> dict[str, np.ndarray]:
    """Fields of all rollouts end to end, by column name; those that nobody has scored are left
    out."""
    first = rollouts[0]
    return {
        name: _joined(rollouts, field)
        for name, field in fields.items()
        if getattr(first, field) is not None
    }


def _joined(rollouts: Sequence[ScoredRollout], field: str) -> np.ndarray:
    return np.concatenate([getattr(rollout, field) for rollout in rollouts])
