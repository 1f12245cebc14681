"""Tiny models for every test: two Qwen3 layers of width 32 on a tokenizer trained here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import make_rollout
from oracles import prefix_logprobs

from listopd_ray.config import ModelConfig
from listopd_ray.models import build_tokenizer, encode_prompt, load_model, make_model
from listopd_ray.task.contract import answer_text, ideal_ranking, prompt_text
from listopd_ray.task.synthetic import SyntheticConfig, make_examples

torch.set_num_threads(1)  # of this process: threads cost more than they bring at this size

# (text, K, whether the end of sequence follows): answers that keep the contract, and ways not to.
COMPLETIONS = [
    ('{"ranking": [2, 1, 3]}', 3, True),
    ('{"ranking": [1, 1, 3]}', 3, True),  # repeated
    ('{"ranking": [10, 2, 12, 1', 12, False),  # two digits; cut off
    ('{"ranking": [4,', 3, False),  # out of range
    ("blue socks", 3, True),
    ("", 3, True),  # the end of sequence alone
    ('{"ranking": [3, 2, 1]} yes', 3, True),
    ('{ "ranking" : [ 2, 3, 1 ] }', 3, True),
]


@pytest.fixture(scope="session")
def examples():
    return make_examples(SyntheticConfig(num_items=3, num_train=48, num_eval=8))["train"]


@pytest.fixture(scope="session")
def tokenizer(examples):
    texts = [prompt_text(e) + answer_text(ideal_ranking(e.relevance)) for e in examples]
    return build_tokenizer(texts, vocab_size=340)


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer, tmp_path_factory):
    """Writes a checkpoint of random weights; other seeds are other models."""

    def make(seed: int) -> Path:
        path = tmp_path_factory.mktemp(f"model-{seed}")
        # A wide initialisation, or every distribution would be nearly uniform and errors invisible.
        config = ModelConfig(num_layers=2, hidden_size=32, intermediate_size=64, init_std=0.3)
        make_model(config, tokenizer, seed).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def student_path(make_checkpoint):
    return make_checkpoint(0)


@pytest.fixture(scope="session")
def teacher_path(make_checkpoint):
    return make_checkpoint(1)


@pytest.fixture(scope="session")
def base_path(make_checkpoint):
    return make_checkpoint(2)


@pytest.fixture(scope="session")
def student_model(student_path):
    return load_model(student_path).eval()


@pytest.fixture(scope="session")
def teacher_model(teacher_path):
    return load_model(teacher_path).eval()


@pytest.fixture(scope="session")
def base_model(base_path):
    return load_model(base_path).eval()


@pytest.fixture(scope="session")
def rollouts(examples, tokenizer, student_model):
    """The student's log-probabilities of `COMPLETIONS`, behind prompts of as many lengths."""
    made = []
    for index, (text, num_items, ended) in enumerate(COMPLETIONS):
        prompt = encode_prompt(tokenizer, examples[index], chat_template=False)[: 5 + 4 * index]
        token_ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * ended
        logprobs = prefix_logprobs(student_model, prompt, token_ids)
        made.append(
            make_rollout(
                prompt,
                token_ids,
                num_items=num_items,
                prompt_id=examples[index].id,
                sampler_logprobs=[row[t] for row, t in zip(logprobs, token_ids, strict=True)],
                finish_reason="stop" if ended else "length",
            )
        )
    assert len({len(r.token_ids) for r in made}) > 4, "lengths must be ragged"
    return tuple(made)


@pytest.fixture(scope="session")
def canary_ids(rollouts):
    return np.concatenate([rollouts[0].prompt.token_ids, rollouts[0].token_ids])
