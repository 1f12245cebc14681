"""Sizes of a model from its config.json, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from listopd_ray.config import LoraConfig, ModelConfig
from listopd_ray.models import one_line, qwen3_config
from listopd_ray.roles.batching import can_share_prompts
from listopd_ray.types import ListopdError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a dense decoder; counts of numbers, not bytes."""

    num_layers: int
    hidden: int  # H
    intermediate: int  # I, of the MLP
    query: int  # q, all heads
    key: int  # k, as wide as the values: all heads of theirs
    vocab: int  # V
    normed: bool  # queries and keys, as in Qwen3
    tied: bool  # the head is the embedding
    shares_prompts: bool  # the samples of a prompt are fed with it once
    parameters: int
    layer: int  # parameters of a layer's matrices
    adapter: int  # parameters of the LoRA adapter that was asked for

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def packed(self) -> int:
        """vLLM's CPU backend keeps a packed copy of a tied head."""
        return self.parameters + (self.head if self.tied else 0)

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with, the head's apart."""
        return self.num_layers * self.layer


def shape_of(
    model: ModelConfig | str, key: str, vocab_size: int, lora: LoraConfig | None = None
) -> Shape:
    """Of a checkpoint directory, of which config.json is enough, or of the model made here with
    `vocab_size` tokens. `key` names it in errors (ListopdError)."""
    path = model if isinstance(model, str) else model.path
    if path is None:
        assert isinstance(model, ModelConfig)
        return _measured(qwen3_config(model, vocab_size), key, lora)
    if not Path(path, "config.json").is_file():
        raise ListopdError(
            f"{key}: {path} has no config.json (of a checkpoint, plan needs no more)"
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ListopdError(f"{key}: {path}: {one_line(error)}") from None
    return _measured(config, key, lora)


def _measured(config: PretrainedConfig, key: str, lora: LoraConfig | None) -> Shape:
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise ListopdError(f"{key}: plan knows dense decoders alone, not mixtures of experts")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        heads, layers = config.num_attention_heads, empty.base_model.layers
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Shape(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=heads * head_size,
            key=config.num_key_value_heads * head_size,
            vocab=config.vocab_size,
            normed=hasattr(layers[0].self_attn, "q_norm"),
            tied=bool(config.tie_word_embeddings),
            shares_prompts=can_share_prompts(empty),
            parameters=sum(p.numel() for p in empty.parameters()),
            layer=sum(p.numel() for p in layers[0].parameters() if p.dim() == 2),
            adapter=_adapter(empty, lora) if lora else 0,
        )
    except (AttributeError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as e:
        raise ListopdError(f"{key}: plan knows dense decoders alone: {e}") from None


def _adapter(empty: PreTrainedModel, lora: LoraConfig) -> int:
    targets = tuple(f".{name}" for name in lora.target_modules)
    linear = [
        module
        for name, module in empty.base_model.layers.named_modules()
        if isinstance(module, torch.nn.Linear) and (not targets or f".{name}".endswith(targets))
    ]
    if not linear and lora.rank:
        raise ListopdError(
            f"lora.target_modules: no linear layer called {', '.join(lora.target_modules)}"
        )
    return lora.rank * sum(module.in_features + module.out_features for module in linear)
