import json

import pytest
import xgrammar

from listopd_ray.roles.vllm_engine import contract_grammar
from listopd_ray.task.contract import answer_text


@pytest.fixture(scope="module")
def matcher(tokenizer):
    """A fresh matcher for K items, as vLLM makes one for every request."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiler = xgrammar.GrammarCompiler(info)

    def make(num_items):
        grammar = compiler.compile_grammar(contract_grammar(num_items))
        return xgrammar.GrammarMatcher(grammar, override_stop_tokens=[tokenizer.eos_token_id])

    return make


@pytest.fixture(scope="module")
def allows(matcher):
    def check(text, num_items):
        made = matcher(num_items)
        return made.accept_string(text) and made.is_completed()

    return check


@pytest.mark.parametrize("num_items", [2, 3, 9, 10, 12, 100])
def test_the_grammar_allows_the_models_own_answers_and_repeated_items(allows, num_items):
    items = list(range(1, num_items + 1))
    assert allows(answer_text(items[::-1]), num_items)
    assert allows(answer_text([num_items] * num_items), num_items)  # a schema cannot forbid it


@pytest.mark.parametrize("num_items", [3, 10, 12])
def test_the_grammar_allows_exactly_k_ids_from_one_to_k(allows, num_items):
    alone = [item for item in range(-3, 200) if allows(answer_text([item] * num_items), num_items)]
    assert alone == list(range(1, num_items + 1))
    assert not allows(answer_text([1] * (num_items - 1)), num_items)
    assert not allows(answer_text([1] * (num_items + 1)), num_items)


@pytest.mark.parametrize(
    "text",
    [
        '{"ranking":[3,1,2]}',  # what vLLM's disable_any_whitespace would force
        '{"ranking":[3, 1, 2]}',
        '{"ranking": [3,1,2]}',
        '{ "ranking": [3, 1, 2]}',
        '{"ranking":  [3, 1, 2]}',
        '{"ranking": [3, 1,\n2]}',
        '{"ranking": [3, 1, 2] }',
        '{"ranking": [3, 1, 2]} ',
        ' {"ranking": [3, 1, 2]}',
        '{"ranking": [3, 1, 02]}',
        '{"ranking": [3, 1, 2.0]}',
        '{"ranking": [3, 1, "2"]}',
        '{"ranking": [3, 1, 2], "why": 1}',
        '{"order": [3, 1, 2]}',
        "[3, 1, 2]",
        "{}",
    ],
)
def test_the_grammar_allows_no_other_spelling_or_schema(allows, text):
    assert not allows(text, 3)


def test_the_tokens_of_an_answer_are_allowed_one_by_one_and_then_only_the_end(tokenizer, matcher):
    made = matcher(12)
    for token_id in tokenizer.encode(answer_text([12, *range(1, 12)])):
        assert not made.is_terminated()
        assert made.accept_token(token_id)
    bitmask = xgrammar.allocate_token_bitmask(1, len(tokenizer))
    made.fill_next_token_bitmask(bitmask)
    words = bitmask.numpy()[0]
    allowed = [t for t in range(len(tokenizer)) if words[t // 32] >> (t % 32) & 1]
    assert allowed == [tokenizer.eos_token_id]
    assert made.accept_token(tokenizer.eos_token_id)
    assert made.is_terminated()


def test_the_grammar_is_that_of_the_json_schema(allows):
    for ranking in ([1, 2, 3], [3, 3, 3], [2, 1, 3]):
        assert allows(json.dumps({"ranking": ranking}), 3)
