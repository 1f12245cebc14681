"""Weights on their way from the learner to the rollout workers: names and tensors."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from listopd_ray.types import ListopdError, Weights

if TYPE_CHECKING:  # not at run time: it takes half a second, and LoRA alone needs it
    from peft import PeftModel

CHECKPOINT_FILE = "model.safetensors"
FILES_TIMEOUT_S = 5.0  # until what one machine has written shows on the others


def export_tensors(
    model: PreTrainedModel | PeftModel, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A copy of every parameter under its checkpoint name, on the CPU; adapters are merged.

    A tied output head is sent under its own name too: vLLM's CPU backend keeps a packed copy of
    the head which an update of the embedding alone leaves stale, without an error.
    """
    if isinstance(model, PreTrainedModel):
        named, base = model.named_parameters(), model
    else:
        from listopd_ray.roles.adapters import merged_tensors

        named, base = merged_tensors(model), model.get_base_model()
    tensors = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in named}
    if base.config.tie_word_embeddings:
        head = base.get_output_embeddings().weight
        tensors["lm_head.weight"] = head.detach().to("cpu", dtype, copy=True)
    return tensors


def to_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }


def torch_tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors again: those of the directory, or read-only views of the object store."""
    if weights.path is not None:
        with safe_open(os.path.join(weights.path, CHECKPOINT_FILE), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)
    for name, array in weights.tensors.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(array)
        yield name, tensor.view(torch.bfloat16) if weights.dtype == "bfloat16" else tensor


def wait_for_files(weights: Weights) -> None:
    """Until all files that were published are seen here, whole; raises ListopdError after a few
    seconds."""
    if weights.path is None:
        return
    end = time.monotonic() + FILES_TIMEOUT_S
    while wrong := _wrong_file(Path(weights.path), weights.files):
        if time.monotonic() > end:
            raise ListopdError(
                f"{wrong} on this machine (sync.path must be storage that all machines share)"
            )
        time.sleep(0.05)


def _wrong_file(directory: Path, files: dict[str, int]) -> str | None:
    for name, size in files.items():
        try:
            found = (directory / name).stat().st_size
        except OSError:
            return f"{directory / name}: not there"
        if found != size:
            return f"{directory / name}: {found} bytes of {size}"
    return None
