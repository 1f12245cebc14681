"""GGUF files as ordinary Hugging Face checkpoint directories, in float32."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from listopd_ray.checkpoint import writing
from listopd_ray.job_config import ImportConfig
from listopd_ray.models import load_model, load_tokenizer, one_line
from listopd_ray.roles.batching import collate, completion_logprobs, gather
from listopd_ray.tracking import check_writable
from listopd_ray.types import ListopdError

MAGIC = b"GGUF"
PROBE = "The three primary colours are red, yellow and blue. Paris is the capital of France."


def import_model(config: ImportConfig) -> str:
    """Write the checkpoint and say so in one line; whole or not at all.

    The model that is read back from the directory must say the same of a probe text as the one
    out of the file. Raises ListopdError for a file that is none, one of an architecture or
    quantisation that transformers cannot convert, and for a directory that exists.
    """
    if config.gguf is None or config.out is None:
        raise ListopdError("model import: give gguf=FILE and out=DIR")
    file, out = Path(config.gguf), Path(config.out)
    _check_file(file)
    if out.exists():
        raise ListopdError(f"out: {out}: exists already")
    check_writable(out)
    model, tokenizer = _read(file)
    with writing(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            partial = Path(scratch, "model")
            _without_quantization(model).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for file_written in partial.iterdir():  # the weights would be their owner's alone
                shutil.copymode(partial / "config.json", file_written)
            ids = load_tokenizer(partial).encode(PROBE)
            if ids != tokenizer.encode(PROBE):
                raise ListopdError(f"{file}: the written tokenizer splits text in another way")
            said = _logprobs(model, ids)
            difference = (_logprobs(load_model(partial), ids) - said).abs().max().item()
            if not difference <= 1e-4:  # NaN fails too
                raise ListopdError(
                    f"{file}: the written checkpoint's log-probabilities differ by {difference:.2g}"
                )
            os.replace(partial, out)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    chance = -math.log(model.config.vocab_size)
    return (
        f"{out}: {type(model).__name__}, {millions:.1f} M parameters in float32; log-probabilities "
        f"within {difference:.1g} nats of the file's, {said.mean():.2f} a token of plain English "
        f"(chance: {chance:.2f})"
    )


def _check_file(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise ListopdError(f"gguf: {file}: {error.strerror}") from None
    if magic != MAGIC:
        raise ListopdError(f"gguf: {file}: not a GGUF file")


def _read(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model, dequantised, and its tokenizer."""
    options = dict(gguf_file=file.name, local_files_only=True)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    except Exception as error:  # several parsers read the file, each with its own
        why = f"damaged, or it cannot be converted: {one_line(error)}"
        raise ListopdError(f"gguf: {file}: {why}") from None
    if report["missing_keys"]:  # transformers would draw them at random
        raise ListopdError(f"gguf: {file}: weights are missing: {min(report['missing_keys'])}")
    return model.eval(), tokenizer


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved: one out of a file still passes for
    quantised."""
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    return copy


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[L − 1], of every token after the first."""
    tokens = np.array(ids)
    batch = collate([tokens[:1]], [tokens[1:]])
    return gather(completion_logprobs(model, batch), batch.token_ids)
