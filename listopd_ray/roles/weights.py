"""Weights that have arrived at a rollout worker."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from listopd_ray.types import ListopdError, Weights

CHECKPOINT_FILE = "model.safetensors"
FILES_TIMEOUT_S = 5.0  # until what one machine has written shows on the others


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
