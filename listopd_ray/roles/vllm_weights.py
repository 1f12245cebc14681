"""How vLLM's engines take weights: in place where they can, and which adapters."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

UNPACKED_WIDTH = 256  # hidden size up to which vLLM's CPU backend keeps matrices unpacked
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be started for


def lora_options(rank: int) -> dict[str, Any]:
    """Arguments of `LLM` for one adapter of this rank at a time."""
    allowed = next((each for each in LORA_RANKS if each >= rank), rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": allowed}


def leave_unpacked(model_path: str) -> bool:
    """Whether vLLM's engines of this process keep a model's matrices as they are from now on.

    Its CPU backend packs them for oneDNN, and a sync packs them anew, layer by layer: nine tenths
    of a small model's, whose matrices are multiplied as quickly as they are (docs/benchmarks.md).
    """
    from vllm.platforms import current_platform

    with open(os.path.join(model_path, "config.json"), encoding="utf-8") as file:
        width = json.load(file).get("hidden_size", math.inf)
    if not current_platform.is_cpu() or width > UNPACKED_WIDTH:
        return False
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils

    def leave(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = leave
    return True


def load_in_place(model: Any, tensors: Iterator[tuple[str, Any]]) -> None:
    """Over the weights of a model without packed ones; raises RuntimeError where some are left."""
    import torch

    with torch.no_grad():
        loaded = model.load_weights(tensors)
    missing = {name for name, _ in model.named_parameters()} - loaded
    if missing:
        raise RuntimeError(f"weights are missing: {sorted(missing)}")
