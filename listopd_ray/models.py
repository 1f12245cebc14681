"""Checkpoints and tokenizers: made here for the embedded default, or any Hugging Face directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from listopd_ray.config import ModelConfig
from listopd_ray.task.contract import chat_messages, prompt_text
from listopd_ray.types import Example, ListopdError, StrPath

transformers_logging.disable_progress_bar()  # one file each: the bars flash by and say nothing

END, PAD = "<|end|>", "<|pad|>"
LOGIT_SCALES = ("logits_scaling", "logit_scale")  # of Granite, of Cohere
HEAD_SIZE = 32  # the smallest that vLLM's CPU attention has a kernel for

# JSON punctuation takes a following space with it, a digit a preceding space and currency sign, so
# that these cost no tokens of their own; every digit and punctuation mark is a single token.
_WORDS = r"""[{}\[\]":,] ?| ?\p{Sc}?\p{N}| ?\p{L}+|\n| ?[^\s\p{L}\p{N}{}\[\]":,]+|\s+"""


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens on `texts`; deterministic."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def make_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    """A freshly initialised tiny Qwen3 with tied embeddings."""
    torch.manual_seed(seed)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen3ForCausalLM(qwen3_config(config, len(tokenizer), **ids))
    model.generation_config = GenerationConfig(**ids, do_sample=True)
    return model


def qwen3_config(config: ModelConfig, vocab_size: int, **ids: int) -> Qwen3Config:
    """Of the tiny Qwen3 that `config` describes."""
    num_heads = config.hidden_size // HEAD_SIZE
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=HEAD_SIZE,
        initializer_range=config.init_std,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        **ids,
    )


def load_model(path: StrPath, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model from a local directory (safetensors only, no remote code).

    Raises ListopdError for a directory that does not hold one.
    """
    path = _checked(path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise ListopdError(f"{path}: not a usable checkpoint: {one_line(error)}") from None
    if report["missing_keys"]:  # transformers would draw them at random
        missing = sorted(report["missing_keys"])
        raise ListopdError(f"{path}: {len(missing)} weights are missing, the first {missing[0]}")
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ListopdError(f"{path}: {name} holds values that are not finite")
    is_scaled = any(getattr(model.config, name, None) not in (None, 0, 1) for name in LOGIT_SCALES)
    if getattr(model.config, "final_logit_softcapping", None) or is_scaled:
        raise ListopdError(f"{path}: models with capped or scaled logits are not supported")
    return model.to(device)


def load_tokenizer(path: StrPath) -> PreTrainedTokenizerFast:
    path = _checked(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ListopdError(f"{path}: no usable tokenizer: {one_line(error)}") from None


def end_ids(path: StrPath, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Token ids that end a completion: the checkpoint's generation config, else its tokenizer."""
    file = Path(path) / "generation_config.json"
    ids = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ListopdError(f"{path}: neither generation config nor tokenizer name an end token")
    return tuple(ids) if isinstance(ids, list) else (ids,)


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, example: Example, *, chat_template: bool
) -> np.ndarray:
    """Token ids [P] int32 of an example's prompt, plain or in the checkpoint's own template."""
    if not chat_template:
        # An item's text must not pass for the end of the sequence.
        ids = tokenizer.encode(prompt_text(example), split_special_tokens=True)
        return np.array(ids, dtype=np.int32)
    if tokenizer.chat_template is None:
        raise ListopdError("task.chat_template=true: the checkpoint's tokenizer has no template")
    text = tokenizer.apply_chat_template(
        chat_messages(example), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


def check_same_tokenizer(paths: dict[str, Path]) -> None:
    """Raises ListopdError where the tokenizers of two roles map text to ids differently."""
    fingerprints = {role: _tokenizer_fingerprint(path) for role, path in paths.items()}
    roles = list(fingerprints)
    for role in roles[1:]:
        if fingerprints[role] != fingerprints[roles[0]]:
            raise ListopdError(
                f"{role} ({paths[role]}) and {roles[0]} ({paths[roles[0]]}) have different "
                "tokenizers"
            )


def model_hash(path: str | Path) -> str:
    """SHA-256 over configuration, weights and tokenizer of a checkpoint directory."""
    digest = hashlib.sha256()
    files = [*Path(path).glob("*.safetensors"), Path(path, "config.json")]
    for file in sorted([*files, Path(path, "tokenizer.json")]):
        if file.exists():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_files(directory: str) -> dict[str, bytes]:
    """A saved model on its way to another machine."""
    return {file.name: file.read_bytes() for file in Path(directory).iterdir()}


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _tokenizer_fingerprint(path: Path) -> str:
    tokenizer = load_tokenizer(path)
    num_embeddings = json.loads(Path(path, "config.json").read_text()).get("vocab_size")
    if num_embeddings is not None and num_embeddings < len(tokenizer):
        raise ListopdError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model embeds {num_embeddings}"
        )
    # Equal vocabularies are no proof of equal splits: a probe of every kind of text goes with them.
    probe = '{"ranking": [3, 10, 2]}\n1 Blue sock’s $12.50 (7)\n\tÄ 東京  x'
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.encode(probe)]
    return hashlib.sha256(json.dumps([content, end_ids(path, tokenizer)]).encode()).hexdigest()


def _checked(path: StrPath) -> str:
    path = os.fspath(path)
    if not Path(path, "config.json").is_file():
        raise ListopdError(f"{path}: not a checkpoint directory (no config.json)")
    return path


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
