"""Supervised fine-tuning with noisy targets: what a Ray Train worker of a warm start does.

A share `format_noise` of the completion's target tokens is replaced by uniformly random ones (the
inputs stay clean), so that model and data say how imperfect the result is: on a contract-valid
prefix the best attainable mass of the right structural token is 1 − noise + noise/V.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray.train.torch import prepare_model
from safetensors.torch import load, save_file
from transformers import PreTrainedModel

from listopd_ray.checkpoint import sync, writing
from listopd_ray.config import WarmstartConfig
from listopd_ray.models import load_model, read_files, write_files
from listopd_ray.roles.optimizer_state import optimizer_tensors, restore_optimizer
from listopd_ray.types import ListopdError

SHOW_EVERY_S = 0.5
KEEP_PAUSE = 20  # times what the last file took: at most a twentieth of the time goes into them


def work(arguments: dict[str, Any]) -> None:
    """A worker's slice of every batch; the batches are those of a single worker.

    Rank 0 puts (updates, loss) into the queue `results`, and at the end the model's files. Where it
    sees the driver's disk, `scratch`, it keeps what `kept` was in the file `unfinished`.
    """
    config: WarmstartConfig = arguments["warmstart"]
    sequences = ray.get(arguments["sequences"])
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    torch.manual_seed(arguments["seed"])
    torch.set_num_threads(arguments["num_threads"])
    with tempfile.TemporaryDirectory() as directory:
        write_files(Path(directory), ray.get(arguments["start"]))
        bare = load_model(directory)
    model = prepare_model(_Losses(bare))
    optimizers = _optimizers(model, config)
    if arguments["kept"] is not None:
        _restore(ray.get(arguments["kept"]), bare, optimizers)
    keeps = rank == 0 and arguments["scratch"].is_dir()
    keep_every = arguments["keep_every_s"] if keeps else math.inf
    shown_at = time.monotonic()
    keep_at = shown_at + keep_every
    batches = _batches(sequences, config, bare.config.vocab_size, arguments["seed"])
    for step, batch in islice(enumerate(batches), arguments["first"], None):
        input_ids, targets, weights = (t[rank::world].to(bare.device) for t in batch)
        # Of a small model the head is much of the work. Where the prompt counts all places do.
        counted = None if config.prompt_loss_weight else weights > 0
        with torch.autocast(bare.device.type, torch.bfloat16, enabled=arguments["autocast"]):
            losses = model(input_ids, targets, counted)
        kept = weights.flatten() if counted is None else weights[counted]
        # DDP averages over ranks: the factor makes it the mean over the whole batch.
        loss = (losses * kept).sum() * world / batch[2].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _lr_factor(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now, is_last = time.monotonic(), step + 1 == config.num_steps
        if rank == 0 and (now - shown_at >= SHOW_EVERY_S or is_last):
            arguments["results"].put((step + 1, loss.item()))
            shown_at = now
        if now >= keep_at and not is_last:
            _keep(arguments, step + 1, bare, optimizers)
            done = time.monotonic()
            keep_at = done + max(keep_every, KEEP_PAUSE * (done - now))
    if rank == 0:
        with tempfile.TemporaryDirectory() as directory:
            bare.save_pretrained(directory)
            arguments["results"].put(read_files(directory))


def _keep(
    arguments: dict[str, Any],
    num_done: int,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Weights and moments in one file, whole or as it was before; where the disk is full training
    goes on without."""
    tensors = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        tensors |= {f"{number}/{name}": value for name, value in optimizer_tensors(optimizer)}
    partial = arguments["scratch"] / "unfinished"
    try:
        with writing(str(arguments["unfinished"])):
            save_file(tensors, partial, {"step": str(num_done)})
            sync(str(partial))
            os.replace(partial, arguments["unfinished"])
    except ListopdError as error:
        partial.unlink(missing_ok=True)
        print(error, file=sys.stderr)


@torch.no_grad()
def _restore(
    content: bytes, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """What `_keep` wrote, in place."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load(content).items():
        part, _, name = name.partition("/")
        parts.setdefault(part, {})[name] = value
    for name, parameter in model.named_parameters():
        parameter.copy_(parts["weights"][name])
    for number, optimizer in enumerate(optimizers):
        restore_optimizer(optimizer, parts[str(number)])


class _Losses(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor | None
    ) -> torch.Tensor:
        """Cross-entropies [N] of the targets [B, L − 1], or of those where `counted` holds."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        if counted is None:
            logits, targets = head(hidden)[:, :-1].flatten(0, 1), targets.flatten()
        else:
            logits, targets = head(hidden[:, :-1][counted]), targets[counted]
        return F.cross_entropy(logits.float(), targets, reduction="none")


def _batches(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    config: WarmstartConfig,
    vocab_size: int,
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Those of all updates: each needs the ones before it to be drawn."""
    rng = np.random.default_rng([seed, 1])
    order = np.empty(0, dtype=np.int64)
    for _ in range(config.num_steps):
        if len(order) < config.batch_size:
            order = np.concatenate([order, rng.permutation(len(sequences))])
        picked, order = order[: config.batch_size], order[config.batch_size :]
        yield _make_batch([sequences[i] for i in picked], config, vocab_size, rng)


def _make_batch(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    config: WarmstartConfig,
    vocab_size: int,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [B, L], next-token targets [B, L − 1] with the noise in, and loss weights of those.

    Every rank draws the whole batch with its noise and then takes its rows, so that the result
    does not depend on the number of workers.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = np.zeros((len(sequences), length), dtype=np.int64)
    weights = np.zeros((len(sequences), length), dtype=np.float32)
    in_answer = np.zeros((len(sequences), length), dtype=bool)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = answer
        weights[row, : len(prompt)] = config.prompt_loss_weight
        weights[row, len(prompt) : end] = 1.0
        in_answer[row, len(prompt) : end] = True
    noise = (rng.random(input_ids.shape) < config.format_noise) & in_answer
    targets = np.where(noise, rng.integers(0, vocab_size, input_ids.shape), input_ids)
    return (
        torch.from_numpy(input_ids),
        torch.from_numpy(targets[:, 1:].copy()),
        torch.from_numpy(weights[:, 1:].copy()),
    )


def _optimizers(model: torch.nn.Module, config: WarmstartConfig) -> list[torch.optim.Optimizer]:
    options = dict(lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    named = list(model.named_parameters())
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([p for _, p in named], **options)]  # type: ignore[arg-type]
    hidden = [p for name, p in named if p.ndim == 2 and not _is_embedding(name)]
    others = [p for name, p in named if p.ndim != 2 or _is_embedding(name)]
    muon = torch.optim.Muon(
        hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, **options)]  # type: ignore[arg-type]


def _is_embedding(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _lr_factor(step: int, config: WarmstartConfig) -> float:
    """Linear warm-up, then a cosine from 1 to 1/20."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))
