"""Warm start: supervised fine-tuning on correct rankings with Ray Train, cached by content.

A share `format_noise` of the completion's target tokens is replaced by uniformly random ones (the
inputs stay clean), so that model and data say how imperfect the result is: on a contract-valid
prefix the best attainable mass of the right structural token is 1 − noise + noise/V.

One that was interrupted goes on, to the same bits, from what it left in the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from ray.util.placement_group import remove_placement_group
from ray.util.queue import Queue
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from listopd_ray.checkpoint import writing
from listopd_ray.cluster import ray_session
from listopd_ray.config import Config, ModelConfig, WarmstartConfig
from listopd_ray.models import (
    build_tokenizer,
    encode_prompt,
    load_model,
    load_tokenizer,
    make_model,
    model_hash,
    one_line,
    read_files,
    write_files,
)
from listopd_ray.placement import Bundle, beside_driver, reserve
from listopd_ray.roles.optimizer_state import optimizer_tensors, restore_optimizer
from listopd_ray.splits import answer_ids, data_directory
from listopd_ray.supervision import handlers_kept
from listopd_ray.task.contract import answer_text, ideal_ranking, prompt_text
from listopd_ray.task.data import dataset_hash, read_examples
from listopd_ray.tracking import progress_bar
from listopd_ray.types import Example, ListopdError

RECIPE = 1  # part of every cache key: raise it when this file trains differently
KEEP_EVERY_S = 120.0  # of a warm start that takes long, to go on from
SHOW_EVERY_S = 0.5


def warm_start(config: Config, role: str) -> Path:
    """The checkpoint directory of `role` ("student" or "teacher"), trained unless it is cached.

    A checkpoint that is taken as it is (`warmstart.num_steps: 0`) is its own warm start. Raises
    ListopdError for data or a checkpoint that cannot be used.
    """
    model: ModelConfig = getattr(config, role)
    if model.path is not None and model.warmstart.num_steps == 0:
        return Path(model.path)
    if model.path is None and model.warmstart.num_steps == 0:
        raise ListopdError(
            f"{role}: give {role}.path, or {role}.warmstart.num_steps > 0 for a model made here"
        )
    target = Path(config.cache) / "warmstart" / _cache_key(config, model)
    if not target.exists():
        _train(config, role, model, target)
    return target


def _cache_key(config: Config, model: ModelConfig) -> str:
    parts = {
        "recipe": RECIPE,
        "torch": torch.__version__,
        "data": dataset_hash(data_directory(config)),
        "task": dataclasses.asdict(config.task),
        "tokenizer": None if model.path else dataclasses.asdict(config.tokenizer),
        "model": {
            **dataclasses.asdict(model),
            "path": model_hash(model.path) if model.path else "",
        },
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "seed": _seed(config, model),
        "workers": config.warmstart_workers,
        **({"autocast": True} if config.learner.autocast else {}),
        # What follows changes the last bits.
        **({} if model.warmstart.prompt_loss_weight else {"head": "counted"}),
        **({"threads": config.num_threads} if config.num_threads else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _train(config: Config, role: str, model: ModelConfig, target: Path) -> None:
    data = data_directory(config)
    examples = read_examples(data / "train.jsonl", max_bad_rows=config.data.max_bad_rows)
    if model.path:
        tokenizer = load_tokenizer(model.path)
    else:
        tokenizer = build_tokenizer(_texts(examples), config.tokenizer.vocab_size)
    sequences = _encode(config, examples, tokenizer)
    unfinished = target.with_name(f"{target.name}.unfinished").absolute()
    first = _updates_done(unfinished)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ListopdError(f"cache: {target.parent}: {error.strerror}") from None
    with ray_session(), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        start = Path(scratch) / "start"
        seed = _seed(config, model)
        initial = load_model(model.path) if model.path else make_model(model, tokenizer, seed)
        initial.save_pretrained(start)
        tokenizer.save_pretrained(start)
        worker = Bundle("warm start", {"CPU": 1.0, "GPU": float(config.device == "cuda")})
        what = f"warmstart_workers={config.warmstart_workers}"
        # Ray Train itself would wait for ever.
        remove_placement_group(reserve(config, what, [worker] * config.warmstart_workers))
        results = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": beside_driver()})
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "start": ray.put(read_files(str(start))),
                "warmstart": model.warmstart,
                "autocast": config.learner.autocast,
                "num_threads": config.num_threads or 1,
                "seed": seed,
                "sequences": ray.put(sequences),
                "results": results,
                "scratch": Path(scratch).absolute(),
                "unfinished": unfinished,
                "first": first,
                "kept": ray.put(unfinished.read_bytes()) if first else None,
                "keep_every_s": KEEP_EVERY_S,
            },
            scaling_config=ScalingConfig(
                num_workers=config.warmstart_workers,
                use_gpu=config.device == "cuda",
                resources_per_worker={"CPU": 1},
            ),
            run_config=RunConfig(name=role, storage_path=str(Path(scratch, "ray").absolute())),
        )
        bar = progress_bar(f"warm start {role}, seed {seed}", model.warmstart.num_steps, first)
        trained: dict[str, bytes] = {}
        watcher = threading.Thread(target=_receive, args=(results, bar, trained), daemon=True)
        watcher.start()
        with handlers_kept():
            trainer.fit()
        watcher.join()
        bar.close()
        results.shutdown()
        finished = Path(scratch) / "finished"
        if "config.json" not in trained:
            raise ListopdError(f"warm start {role}: the trained model was lost on its way here")
        write_files(finished, trained)
        tokenizer.save_pretrained(finished)
        if not target.exists():  # another process may have made the same one meanwhile
            os.replace(finished, target)
        unfinished.unlink(missing_ok=True)


def _seed(config: Config, model: ModelConfig) -> int:
    return config.seed if model.warmstart.seed is None else model.warmstart.seed


def _texts(examples: Sequence[Example]) -> list[str]:
    return [prompt_text(e) + answer_text(ideal_ranking(e.relevance)) for e in examples]


def _encode(
    config: Config, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, completion) token ids of every example whose prompt is short enough."""
    sequences = []
    for example in examples:
        prompt = encode_prompt(tokenizer, example, chat_template=config.task.chat_template)
        if len(prompt) <= config.data.max_prompt_tokens:
            sequences.append((prompt, answer_ids(tokenizer, example)))
    return sequences


def _receive(results: Queue, bar: tqdm, trained: dict[str, bytes]) -> None:
    """Show what rank 0 reports, (updates, loss), until it sends the model's files."""
    with suppress(RayError):  # the command was ended
        while isinstance(item := results.get(), tuple):
            step, loss = item
            bar.update(step - bar.n)
            bar.set_postfix(refresh=False, loss=f"{loss:.3f}")
        trained.update(item)


def _updates_done(unfinished: Path) -> int:
    """By an interrupted warm start, of which this file is left."""
    if not unfinished.exists():
        return 0
    try:
        with safe_open(unfinished, "pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError) as error:
        raise ListopdError(f"{unfinished}: damaged, remove it: {one_line(error)}") from None


def _worker(arguments: dict[str, Any]) -> None:
    """One Ray Train worker: its slice of every batch; the batches are those of a single worker."""
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
    # Another machine than the driver's may not see its cache: nothing is kept then.
    keeps = rank == 0 and arguments["scratch"].is_dir()
    kept_at = shown_at = time.monotonic()
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
        if keeps and now - kept_at >= arguments["keep_every_s"] and not is_last:
            _keep(arguments, step + 1, bare, optimizers)
            kept_at = time.monotonic()
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
    """Weights and moments in one file, whole or as it was before."""
    tensors = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        tensors |= {f"{number}/{name}": value for name, value in optimizer_tensors(optimizer)}
    partial = arguments["scratch"] / "unfinished"
    with writing(str(arguments["unfinished"])):
        save_file(tensors, partial, {"step": str(num_done)})
        os.replace(partial, arguments["unfinished"])


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
