"""Warm start: supervised fine-tuning on correct rankings with Ray Train, cached by content.

One that was interrupted goes on from what it left in the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import remove_placement_group
from ray.util.queue import Queue
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from listopd_ray.cluster import ray_session
from listopd_ray.config import Config, ModelConfig
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
from listopd_ray.splits import answer_ids, data_directory
from listopd_ray.supervised import work
from listopd_ray.supervision import handlers_kept
from listopd_ray.task.contract import answer_text, ideal_ranking, prompt_text
from listopd_ray.task.data import dataset_hash, read_examples
from listopd_ray.tracking import progress_bar
from listopd_ray.types import Example, ListopdError

RECIPE = 1  # part of every cache key: raise it when supervised.py trains differently
KEEP_EVERY_S = 120.0  # weights and moments, to go on from


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
        unfinished = target.with_name(f"{target.name}.unfinished").absolute()
        kept, first = _take_up(unfinished, Path(scratch) / "kept")
        results = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": beside_driver()})
        trainer = TorchTrainer(
            work,
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
                "kept": kept,
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


def _take_up(unfinished: Path, copy: Path) -> tuple[ray.ObjectRef | None, int]:
    """What an interrupted warm start has left, and after how many updates. By way of a copy: a
    second process at the same warm start may replace the file, or finish, at any time."""
    try:
        shutil.copyfile(unfinished, copy)
        with safe_open(copy, "pt") as file:
            num_done = int(file.metadata()["step"])
        return ray.put(copy.read_bytes()), num_done
    except FileNotFoundError:
        return None, 0
    except OSError as error:
        raise ListopdError(f"{unfinished}: {error.strerror}") from None
    except SafetensorError as error:
        raise ListopdError(f"{unfinished}: damaged, remove it: {one_line(error)}") from None
    finally:
        copy.unlink(missing_ok=True)
