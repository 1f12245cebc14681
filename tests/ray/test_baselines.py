"""What distillation is compared with: decoding under a grammar, and a teacher's labels."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xgrammar
from transformers import PreTrainedModel

from listopd_ray.cluster import serve
from listopd_ray.config import Config, load_config
from listopd_ray.evaluate import judge_rollout
from listopd_ray.label import LabelConfig, label, label_command
from listopd_ray.models import encode_prompt, end_ids
from listopd_ray.prepare import prepare
from listopd_ray.roles.vllm_engine import contract_grammar
from listopd_ray.task.contract import TokenText
from listopd_ray.task.data import read_examples
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic
from listopd_ray.types import Example, ListopdError, Prompt


def with_grammar(config: Config) -> Config:
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, grammar=True))


def test_under_the_grammar_even_random_weights_finish_only_with_json_of_k_ids(
    ray_cluster: None, config: Config, student_path: Path, tokenizer: Any
) -> None:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            id=f"random-{number}",
            token_ids=rng.integers(2, len(tokenizer), 10).astype(np.int32),
            num_items=num_items,
        )
        for number, num_items in enumerate([2, 3, 12] * 16)  # mixed in every batch
    ]
    text = TokenText(tokenizer, end_ids(student_path, tokenizer))
    arguments: dict[str, Any] = dict(
        student_path=student_path,
        end_ids=end_ids(student_path, tokenizer),
        max_prompt_tokens=10,
        max_new_tokens=40,
    )
    with serve(with_grammar(config), **arguments) as workers:
        sampled, greedy = (
            [r for part in workers.fetch(pending) for r in part.rollouts]
            for pending in [workers.generate(prompts, "test", greedy=g) for g in (False, True)]
        )
    assert [r.prompt.id for r in sampled] == [p.id for p in prompts]
    reasons = set()
    for rollout in (*sampled, *greedy):
        judged = judge_rollout(rollout, text)
        reasons.add(judged.reason)
        assert np.isfinite(rollout.sampler_logprobs).all() and rollout.sampler_logprobs.max() <= 0
        if rollout.finish_reason == "stop":
            num_items = rollout.prompt.num_items
            ranking = json.loads(judged.text)["ranking"]
            assert judged.text == json.dumps({"ranking": ranking})
            assert len(ranking) == num_items
            assert set(ranking) <= set(range(1, num_items + 1))
    assert reasons == {None, "not_a_permutation", "truncated"}


def test_training_under_the_grammar_is_refused_before_any_work(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ListopdError, match=r"^rollout\.grammar: only for evaluate") as raised:
        prepare(with_grammar(dataclasses.replace(config, cache=str(tmp_path / "cache"))))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


def masked_greedy(model: PreTrainedModel, tokenizer: Any, example: Example, limit: int) -> str:
    """What transformers and xgrammar write, one token at a time."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    grammar = xgrammar.GrammarCompiler(info).compile_grammar(contract_grammar(len(example.items)))
    matcher = xgrammar.GrammarMatcher(grammar)
    bitmask = xgrammar.allocate_token_bitmask(1, len(tokenizer))
    prompt = encode_prompt(tokenizer, example, chat_template=False).tolist()
    completion: list[int] = []
    while len(completion) < limit and not matcher.is_terminated():
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[:, -1]
        matcher.fill_next_token_bitmask(bitmask)
        xgrammar.apply_token_bitmask_inplace(logits, bitmask)
        completion.append(int(logits.argmax()))
        assert matcher.accept_token(completion[-1])
    return tokenizer.decode(completion[:-1]) if matcher.is_terminated() else "truncated"


def test_labels_are_the_greedy_rankings_that_transformers_and_xgrammar_find(
    ray_cluster: None,
    student_path: Path,
    student_model: PreTrainedModel,
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out = tmp_path / "data", tmp_path / "labelled"
    write_synthetic(SyntheticConfig(out=str(data), num_items=2, num_train=24, num_eval=8))
    pairs = [f"data.path={data}", f"out={out}", "rollout.grammar=true", "rollout.max_num_seqs=4"]
    pairs.append("rollout.max_new_tokens=24")
    label_command(str(student_path), load_config(LabelConfig, pairs))

    expected, dropped = {}, Counter[str]()
    for example in read_examples(data / "train.jsonl", max_bad_rows=0):
        answer = masked_greedy(student_model, tokenizer, example, limit=24)
        ranking = tuple(json.loads(answer)["ranking"]) if answer != "truncated" else ()
        if sorted(ranking) == [1, 2]:
            relevance = tuple({1: 1.0, 2: 0.5}[1 + ranking.index(item)] for item in (1, 2))
            expected[example.id] = dataclasses.replace(example, relevance=relevance)
        else:
            dropped["not_a_permutation" if ranking else "truncated"] += 1
    assert {e.relevance for e in expected.values()} == {(1.0, 0.5), (0.5, 1.0)} and dropped
    labelled = read_examples(out / "train.jsonl", max_bad_rows=0)
    assert labelled == list(expected.values())
    assert (out / "eval.jsonl").read_bytes() == (data / "eval.jsonl").read_bytes()
    assert json.loads((out / "dataset.json").read_text())["dropped"] == dict(dropped)
    reasons = ", ".join(f"{dropped[reason]} {reason}" for reason in sorted(dropped))
    assert capsys.readouterr().out == (
        f"{out}: {len(expected)} train examples as {student_path} ranks them, "
        f"dropped {reasons}; 8 eval examples unchanged\n"
    )


def test_label_overwrites_nothing(config: Config, student_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for taken in (Path(str(config.data.path)), tmp_path / "file"):
        with pytest.raises(ListopdError, match="not an empty directory"):
            label(config, student_path, taken)
