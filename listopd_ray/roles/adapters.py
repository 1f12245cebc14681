"""LoRA adapters: merged into a copy of the weights, and as PEFT directories."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from listopd_ray.types import ListopdError

NAME = "default"  # PEFT's own, of a model's only adapter
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"


def merged_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of the model that `model` stands for, under its checkpoint name.

    An adapted weight is W + ΔW in float32, a tensor of its own; all others are the trained tensors
    themselves. Nothing is changed: `merge_adapter` writes into W, and in bfloat16 what it adds
    `unmerge_adapter` does not take away again.
    """
    base = model.get_base_model()
    adapted = {name: each for name, each in base.named_modules() if isinstance(each, LoraLayer)}
    for name, parameter in base.named_parameters():
        owner, _, kind = name.rpartition(".")
        owner = owner.removesuffix(".base_layer")
        if ".lora_" in name or ".original_module." in name:
            continue
        if owner in adapted and kind == "weight":
            parameter = parameter.float() + _delta(owner, adapted[owner])
        yield f"{owner}.{kind}".replace(f".modules_to_save.{NAME}.", "."), parameter


def check_names(model: PeftModel) -> None:
    """Raises ListopdError where `merged_tensors` are not the tensors of a checkpoint."""
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.tie_word_embeddings and any(isinstance(end, LoraLayer) for end in ends):
        raise ListopdError("lora.target_modules: embedding and head are tied, one tensor")
    with torch.device("meta"), torch.no_grad():
        names = {name for name, _ in type(base)(base.config).named_parameters()}
    merged = {name for name, _ in merged_tensors(model)}
    if merged != names:
        raise ListopdError(
            f"LoRA: {len(merged ^ names)} merged tensors are not those of the checkpoint, the "
            f"first {min(merged ^ names)}"
        )


def write_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter alone as a PEFT directory, its tensors as they are trained."""
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / TENSORS_FILE)
    model.peft_config[NAME].save_pretrained(str(directory))


def check_rank(path: str, rank: int) -> None:
    """Raises ListopdError where the adapter at `path` has another rank."""
    found = json.loads(Path(path, CONFIG_FILE).read_text())["r"]
    if found != rank:
        raise ListopdError(f"{path}: an adapter of rank {found}, the engine's are of rank {rank}")


def load_adapter(model: PreTrainedModel, peft: PeftModel | None, path: str) -> PeftModel:
    """Into `model` itself; `peft`: what the call for the adapter before has returned."""
    if peft is None:
        return PeftModel.from_pretrained(model, path).eval()
    tensors = load_file(os.path.join(path, TENSORS_FILE))
    result = set_peft_model_state_dict(peft, tensors, adapter_name=NAME)
    if result.unexpected_keys:
        raise ListopdError(f"{path}: the model has no {min(result.unexpected_keys)}")
    return peft


def _delta(name: str, layer: LoraLayer) -> torch.Tensor:
    """ΔW = α/r · B A in float32, whatever the adapter's type."""
    if not isinstance(layer, Linear) or layer.lora_variant or layer.lora_bias[NAME]:
        raise ListopdError(f"LoRA: {name} is adapted otherwise than by W + α/r · B A")
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    delta = up.float() @ down.float()
    return (delta.T if layer.fan_in_fan_out else delta) * layer.scaling[NAME]
