import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from listopd_ray.config import ModelConfig
from listopd_ray.models import (
    build_tokenizer,
    check_same_tokenizer,
    encode_prompt,
    end_ids,
    load_model,
    load_tokenizer,
    make_model,
    model_hash,
)
from listopd_ray.task.contract import answer_text, prompt_text
from listopd_ray.types import ListopdError

TEXTS = ['1 blue socks $3\n2 red hat $9\n{"ranking": [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]}'] * 3


def pieces(tokenizer, text):
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


@pytest.mark.parametrize("char", '0123456789{}[]":,')
def test_every_digit_and_json_mark_is_a_single_token(tokenizer, char):
    assert pieces(tokenizer, char) == [char]
    # Side by side they stay apart, whatever the data held.
    assert pieces(tokenizer, char * 3) == [char] * 3
    assert pieces(tokenizer, f"12{char}34") == ["1", "2", char, "3", "4"]


def test_frequent_numbers_and_bracket_runs_do_not_merge_into_one_token():
    tokenizer = build_tokenizer(['2024 2024 12 12 {"{"[[ ]]}'] * 50, 400)
    assert pieces(tokenizer, "2024") == ["2", "0", "2", "4"]
    assert pieces(tokenizer, " 12") == [" 1", "2"]
    assert pieces(tokenizer, '{"[[ ]]}') == ["{", '"', "[", "[ ", "]", "]", "}"]


def test_a_space_costs_no_token_beside_a_mark_or_digit_of_the_data(tokenizer):
    for text in (", ", ": ", *(f" {digit}" for digit in "123")):
        assert pieces(tokenizer, text) == [text]


@pytest.mark.parametrize("num_items", [3, 12])
def test_an_answer_has_a_token_for_each_mark_and_digit(tokenizer, num_items):
    ranking = list(range(num_items, 0, -1))
    between = [*", ".join(map(str, ranking)).replace(", ", ",")]
    expected = ["{", '"', "ranking", '"', ": ", "["]
    expected += [", " if char == "," else char for char in between]
    assert pieces(tokenizer, answer_text(ranking)) == [*expected, "]", "}"]


@settings(deadline=None, max_examples=300)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_no_special_tokens_are_added_to_a_text(tokenizer):
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not special & set(tokenizer.encode("blue socks"))
    assert len(special) == 2


def test_training_a_tokenizer_twice_gives_the_same(examples, tokenizer):
    texts = [prompt_text(example) for example in examples]
    first, second = (build_tokenizer(texts, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    assert len(build_tokenizer(texts, 300)) == 300


def test_a_saved_tokenizer_reads_back_as_the_same(tokenizer, student_path):
    loaded = load_tokenizer(student_path)
    text = '{"ranking": [3, 10, 2]}\n Ä 東京\t$12 <|end|>'
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert end_ids(student_path, loaded) == (tokenizer.eos_token_id,)


def test_end_ids_are_those_of_the_generation_config_first(student_path, tokenizer, tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert end_ids(tmp_path, tokenizer) == (5, 6)
    file.write_text("{}")
    assert end_ids(tmp_path, tokenizer) == (tokenizer.eos_token_id,)
    file.unlink()
    assert end_ids(tmp_path, tokenizer) == (tokenizer.eos_token_id,)


@pytest.fixture
def other_tokenizer_path(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "other")
    build_tokenizer(TEXTS, 280).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_roles_with_the_same_tokenizer_pass(student_path, teacher_path):
    check_same_tokenizer({"student": student_path, "teacher": teacher_path})


def test_roles_with_different_tokenizers_are_named(
    student_path, teacher_path, other_tokenizer_path
):
    paths = {"student": student_path, "teacher": teacher_path, "base": other_tokenizer_path}
    with pytest.raises(ListopdError, match=r"base .* and student .* different tokenizers"):
        check_same_tokenizer(paths)


def test_the_same_vocabulary_split_another_way_is_another_tokenizer(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:10]  # fewer merges, same tokens
    file.write_text(json.dumps(content))
    with pytest.raises(ListopdError, match="different tokenizers"):
        check_same_tokenizer({"student": student_path, "teacher": tmp_path / "other"})


def test_another_end_of_sequence_is_another_tokenizer(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "other")
    file = tmp_path / "other" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 7}))
    with pytest.raises(ListopdError, match="different tokenizers"):
        check_same_tokenizer({"student": student_path, "teacher": tmp_path / "other"})


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_directory_without_a_checkpoint_is_named(load, tmp_path):
    with pytest.raises(ListopdError, match="not a checkpoint directory") as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(ListopdError, match="not a checkpoint directory"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "config.json").write_text("{}"),
        lambda path: (path / "config.json").write_text("not json"),
        lambda path: (path / "config.json").write_text('{"model_type": "no_such_model"}'),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "model.safetensors").write_bytes(b"garbage"),
    ],
    ids=["empty", "not-json", "unknown", "no-weights", "garbled-weights"],
)
def test_a_broken_checkpoint_is_an_error_of_one_line(student_path, tmp_path, spoil):
    shutil.copytree(student_path, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(ListopdError) as raised:
        load_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(student_path, tmp_path, value):
    shutil.copytree(student_path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ListopdError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that"):
        load_model(tmp_path / "model")


def test_a_weight_that_is_missing_is_not_drawn_at_random(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ListopdError, match=r"1 weights are missing, the first model\.layers\.1"):
        load_model(tmp_path / "model")


def test_weights_of_another_architecture_are_refused(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text()) | {"num_hidden_layers": 3}
    file.write_text(json.dumps(content))
    with pytest.raises(ListopdError, match=r"not a usable checkpoint: .*num_hidden_layers"):
        load_model(tmp_path / "model")
    file.write_text(json.dumps(content | {"layer_types": 3 * ["full_attention"]}))
    with pytest.raises(ListopdError, match="weights are missing"):
        load_model(tmp_path / "model")


TINY = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**TINY, logits_scaling=8.0),
        CohereConfig(**TINY),
        Gemma2Config(**TINY, head_dim=8),
    ],
)
def test_logits_that_are_not_the_heads_products_are_refused(config, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ListopdError, match="capped or scaled logits are not supported"):
        load_model(tmp_path)


def test_a_scale_of_one_is_none(tmp_path):
    AutoModelForCausalLM.from_config(GraniteConfig(**TINY)).save_pretrained(tmp_path)
    load_model(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(student_path, tmp_path):
    shutil.copytree(student_path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))
    with pytest.raises(ListopdError, match=r"the tokenizer has \d+ tokens, the model embeds 100"):
        check_same_tokenizer({"student": tmp_path / "model"})


def test_a_model_is_a_function_of_its_seed(tokenizer):
    config = ModelConfig(num_layers=1, hidden_size=32, intermediate_size=32)
    first, same, other = (make_model(config, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    name = "model.embed_tokens.weight"
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(config.init_std, rel=0.1)
    assert first["lm_head.weight"].data_ptr() == first[name].data_ptr()  # tied


def test_model_hash_changes_with_weights_configuration_and_tokenizer(student_path, tmp_path):
    before = model_hash(student_path)
    assert len(before) == 64
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = tmp_path / name
        shutil.copytree(student_path, path)
        assert model_hash(path) == before  # where it lies does not matter
        file = path / name
        file.write_bytes(file.read_bytes() + b" ")
        assert model_hash(path) != before


def test_a_prompt_is_the_encoded_text(tokenizer, examples):
    ids = encode_prompt(tokenizer, examples[0], chat_template=False)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt_text(examples[0])


def test_text_that_spells_the_end_of_sequence_does_not_end_it(tokenizer, examples):
    item = dataclasses.replace(examples[0].items[0], text=f"socks {tokenizer.eos_token}")
    example = dataclasses.replace(examples[0], items=(item, *examples[0].items[1:]))
    assert tokenizer.eos_token_id in tokenizer.encode(prompt_text(example))
    ids = encode_prompt(tokenizer, example, chat_template=False)
    assert tokenizer.eos_token_id not in ids


def test_a_chat_prompt_is_the_checkpoints_template_with_thinking_off(student_path, examples):
    tokenizer = load_tokenizer(student_path)
    with pytest.raises(ListopdError, match="no template"):
        encode_prompt(tokenizer, examples[0], chat_template=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
        "{% if enable_thinking is false %}[no thinking]{% endif %}"
    )
    text = tokenizer.decode(encode_prompt(tokenizer, examples[0], chat_template=True))
    assert text.startswith("[user]")
    assert text.endswith("[assistant][no thinking]")
    assert all(item.text in text for item in examples[0].items)
