"""LoRA adapters that have arrived at a rollout worker, as PEFT directories."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from listopd_ray.types import ListopdError


def check_rank(path: str, rank: int) -> None:
    """Raises ListopdError where the adapter at `path` has another rank."""
    found = json.loads(Path(path, "adapter_config.json").read_text())["r"]
    if found != rank:
        raise ListopdError(f"{path}: an adapter of rank {found}, the engine's are of rank {rank}")


def load_adapter(model: PreTrainedModel, peft: PeftModel | None, path: str) -> PeftModel:
    """Into `model` itself; `peft`: what the call for the adapter before has returned."""
    if peft is None:
        return PeftModel.from_pretrained(model, path).eval()
    tensors = load_file(os.path.join(path, "adapter_model.safetensors"))
    result = set_peft_model_state_dict(peft, tensors)
    if result.unexpected_keys:
        raise ListopdError(f"{path}: the model has no {min(result.unexpected_keys)}")
    return peft
