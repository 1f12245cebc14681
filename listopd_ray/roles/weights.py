"""Weights on their way from the learner to the rollout workers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from listopd_ray.types import Weights


def export_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """A copy of every parameter under its checkpoint name, on the CPU.

    A tied output head is sent under its own name too: vLLM's CPU backend keeps a packed copy of
    the head which an update of the embedding alone leaves stale, without an error.
    """
    tensors = {name: p.detach().to("cpu", dtype, copy=True) for name, p in model.named_parameters()}
    head = model.get_output_embeddings().weight
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = head.detach().to("cpu", dtype, copy=True)
    return {name: to_numpy(tensor) for name, tensor in tensors.items()}


def torch_tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors again, as read-only views of the object store's memory."""
    for name, array in weights.tensors.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(array)
        yield name, tensor.view(torch.bfloat16) if weights.dtype == "bfloat16" else tensor


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
