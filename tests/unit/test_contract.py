import functools
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from listopd_ray.task.contract import (
    OPENING,
    REASONS,
    IdTokens,
    TokenText,
    answer_text,
    chat_messages,
    first_violation,
    ideal_ranking,
    judge,
    prompt_text,
    scan,
    strict_parse,
)
from listopd_ray.types import Example, Item, TokenClass

LETTERS = {
    TokenClass.OPENING: "o",
    TokenClass.ITEM_ID: "i",
    TokenClass.SEPARATOR: "s",
    TokenClass.CLOSING: "c",
    TokenClass.STRAY: "!",
}

rankings = st.integers(1, 13).flatmap(lambda k: st.permutations(range(1, k + 1)))
fuzz_settings = settings(max_examples=300, deadline=None)


def class_letters(pieces, num_items, ended=False):
    classes = scan(pieces, num_items, ended).classes
    assert classes.shape == (len(pieces),)
    assert classes.dtype == np.int8
    return "".join(LETTERS[TokenClass(token_class)] for token_class in classes)


class TokenizerOfText:
    """The part of a Hugging Face tokenizer that the contract uses, without importing it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text, add_special_tokens):
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids, skip_special_tokens, clean_up_tokenization_spaces):
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def get_vocab(self):
        return self.tokenizer.get_vocab()


@functools.cache
def build_tokenizer(kind):
    """Three ways to cut an answer into tokens: bytes, merged words, SentencePiece spaces."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=257 if kind == "bytes" else 400,
        special_tokens=["<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    shuffler = random.Random(0)
    answers = [answer_text(shuffler.sample(range(1, 13), 12)) for _ in range(100)]
    tokenizer.train_from_iterator(answers, trainer)
    return TokenizerOfText(tokenizer)


# Prompt and answer


@pytest.fixture
def example():
    items = (Item(id="a", text="belt $3 7"), Item(id="b", text="socks\n3 fake"))
    return Example(id="e", query="socks $5", items=items, relevance=(0.0, 1.0))


def test_the_plain_prompt_has_one_line_for_the_query_and_one_for_each_item(example):
    assert prompt_text(example) == "socks $5\n1 belt $3 7\n2 socks 3 fake\n"


def test_the_chat_prompt_is_one_user_message_that_holds_query_items_and_form(example):
    (message,) = chat_messages(example)
    assert message["role"] == "user"
    for part in ("socks $5\n", "\n1 belt $3 7\n2 socks 3 fake\n", '{"ranking": [', "all 2 "):
        assert part in message["content"]


def test_the_answer_text_is_canonical_for_numpy_integers_too():
    assert answer_text((3, 1, 2)) == '{"ranking": [3, 1, 2]}'
    assert answer_text(np.array([2, 1])) == '{"ranking": [2, 1]}'


def test_the_ideal_ranking_descends_and_keeps_ties_in_the_order_of_the_list():
    assert ideal_ranking([0.0, 2.0, 0.0, 3.0, 2.0]) == (4, 2, 5, 1, 3)


# Strict parse


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"ranking": [3, 1, 2]}', None),
        (' \n{ "ranking"\t:[3,1 ,\r2] } \n', None),
        ("", "not_json"),
        ("3, 1, 2", "not_json"),
        ('{"ranking": [3, 1, 2]', "not_json"),
        ("{'ranking': [3, 1, 2]}", "not_json"),
        ('{"ranking": [03, 1, 2]}', "not_json"),
        ('{"ranking": [3, 1, 2,]}', "not_json"),
        ('{"ranking": NaN}', "not_json"),
        ('{"ranking": [Infinity, 1, 2]}', "not_json"),
        ('{"ranking": [' + "9" * 5000 + ", 1, 2]}", "not_json"),
        ('{"ranking": ' + "[" * 100_000, "not_json"),
        ('{"a":' * 100_000, "not_json"),
        ('{"ranking": [3, 1, 2]} ', None),
        ('{"ranking": [3, 1, 2]}.', "extra_text"),
        ('{"ranking": [3, 1, 2]}{"ranking": [3, 1, 2]}', "extra_text"),
        ('Sure: {"ranking": [3, 1, 2]}', "extra_text"),
        ('```json\n{"ranking": [3, 1, 2]}\n```', "extra_text"),
        ('{"ranking": [3, 1, 2]}\xa0', "extra_text"),
        ('{"order": [9]} hence', "extra_text"),
        ("[3, 1, 2]", "wrong_schema"),
        ('[["ranking", [3, 1, 2]]]', "wrong_schema"),
        ("null", "wrong_schema"),
        ("{}", "wrong_schema"),
        ('{"Ranking": [3, 1, 2]}', "wrong_schema"),
        ('{"ranking": [3, 1, 2], "why": 1}', "wrong_schema"),
        ('{"ranking": [3, 1, 2], "ranking": [3, 1, 2]}', "wrong_schema"),
        ('{"ranking": {"3": 1}}', "wrong_schema"),
        ('{"ranking": "3, 1, 2"}', "wrong_schema"),
        ('{"ranking": [3, true, 2]}', "wrong_schema"),
        ('{"ranking": [3, 1.0, 2]}', "wrong_schema"),
        ('{"ranking": [3, "1", 2]}', "wrong_schema"),
        ('{"ranking": [[3, 1, 2]]}', "wrong_schema"),
        ('{"ranking": []}', "not_a_permutation"),
        ('{"ranking": [3, 1]}', "not_a_permutation"),
        ('{"ranking": [3, 1, 2, 4]}', "not_a_permutation"),
        ('{"ranking": [3, 1, 1]}', "not_a_permutation"),
        ('{"ranking": [3, 1, 2, 2]}', "not_a_permutation"),
        ('{"ranking": [3, 1, 0]}', "not_a_permutation"),
        ('{"ranking": [3, -1, 2]}', "not_a_permutation"),
    ],
)
def test_a_completion_parses_or_fails_for_the_first_reason_that_applies(text, reason):
    expected = (None, reason) if reason else ((3, 1, 2), None)
    assert strict_parse(text, 3, "stop") == expected
    assert reason is None or reason in REASONS


@pytest.mark.parametrize("text", ['{"ranking": [1]}', "", "[1]"])
def test_truncation_comes_before_every_other_reason(text):
    assert strict_parse(text, 1, "length") == (None, "truncated")


def test_a_judged_completion_carries_text_and_verdict():
    good = judge("e", '{"ranking": [2, 1]}', 2, "stop")
    assert (good.example_id, good.ranking, good.reason) == ("e", (2, 1), None)
    bad = judge("e", "2 1", 2, "stop")
    assert (bad.text, bad.ranking, bad.reason) == ("2 1", None, "not_json")


contract_like = st.text(alphabet=' {}[]:,"rankig123\n', max_size=40)


@fuzz_settings
@given(text=st.text(max_size=60) | contract_like, num_items=st.integers(1, 4))
def test_the_parse_never_raises_and_gives_either_a_ranking_or_a_reason(text, num_items):
    ranking, reason = strict_parse(text, num_items, "stop")
    assert (ranking is None) == (reason in REASONS)
    if ranking is not None:
        assert sorted(ranking) == list(range(1, num_items + 1))
        assert strict_parse(answer_text(ranking), num_items, "stop") == (ranking, None)


@st.composite
def edited_answers(draw, alphabet):
    """(ranking, its canonical answer with one character replaced, inserted or removed)"""
    ranking = tuple(draw(rankings))
    text = answer_text(ranking)
    position = draw(st.integers(0, len(text)))
    inserted = draw(alphabet | st.just(""))
    removed = draw(st.integers(0, 1))
    return ranking, text[:position] + inserted + text[position + removed :]


@fuzz_settings
@given(edited_answers(st.characters() | st.sampled_from(' \n\t0123456789,]}"')))
def test_one_edited_character_never_turns_an_answer_into_another_ranking(edited):
    ranking, text = edited
    parsed, _ = strict_parse(text, len(ranking), "stop")
    if parsed is not None:
        assert parsed == ranking
        assert "".join(text.split()) == "".join(answer_text(ranking).split())


# Token classes


@pytest.mark.parametrize(
    ("pieces", "letters"),
    [
        (
            ["{", '"', "rank", "ing", '"', ":", " [", "3", ",", " ", "1", ",", " 2", "]", "}"],
            "oooooooissisicc",
        ),
        (['{"ranking": [', "3", ", 1", ", 2", "]}"], "oissc"),
        (['{"ranking": ', "[3", ", 1", ", 2", "]}\n"], "oossc"),
        (['{"ranking": [', "3,", " 1,", " 2", "]", "}"], "oiiicc"),
        (['{"ranking": [', "3, 1, 2]}"], "oi"),
        (['{"ranking": [3, 1, 2]}'], "o"),
        (["\n", "{", "", " ", '"ranking":[', " ", "3"], "ooooooi"),
        (['{"ranking":[', "3", " ", ",1", " ,", "2", " ", "]", " ", "}"], "oisssicccc"),
    ],
)
def test_tokens_get_their_class_however_the_answer_is_cut(pieces, letters):
    assert class_letters(pieces, 3) == letters
    is_whole = "".join(pieces).endswith(("}", "}\n"))
    due = "c" if is_whole else {"o": "i", "i": "s"}[letters[-1]]
    assert class_letters([*pieces, "<eos>"], 3, ended=True) == letters + due
    assert class_letters([*pieces, "<eos>", "<eos>"], 3, ended=True)[-1] == "!"


@pytest.mark.parametrize(
    ("pieces", "num_items", "letters"),
    [
        (["Sure", ':{"ranking":[1]}'], 1, "o!"),
        (['{"', "order", '":[', "1"], 1, "oo!!"),
        (['{"rank', " ", 'ing":['], 1, "oo!"),
        (['{"ranking":', "1", "]"], 2, "oo!"),  # an id before the list
        (['{"ranking":[', "]", "}"], 2, "oi!"),  # closed before any id
        (['{"ranking":[', ",", "1"], 2, "oi!"),  # a separator where an id must stand
        (['{"ranking":[', "1", ",", ",", "2"], 2, "oisi!"),
        (['{"ranking":[', "1", "]", "}"], 2, "ois!"),  # closed early
        (['{"ranking":[', "1", "]}"], 2, "ois"),
        (['{"ranking":[', "1", ",", "2", ",", "1"], 2, "oisic!"),  # goes on after the last id
        (['{"ranking":[', "1", " ", "2"], 2, "oiss"),  # no separator
        (['{"ranking":[', "1", " 2"], 12, "ois"),
        (['{"ranking":[', "1", "2", ","], 12, "oiis"),  # one id of two tokens
        (['{"ranking":[', "1", "2", ","], 6, "ois!"),  # no id of 6 goes on after a digit
        (['{"ranking":[', "12", ",", "1"], 6, "oi!!"),  # out of range
        (['{"ranking":[', "07", ",", "0", "7"], 6, "oi!!!"),
        (['{"ranking":[', "2", ",", "2", "]}"], 2, "oisi!"),  # repeated
        (['{"ranking":[', "1", ",", "1", "2", ","], 12, "oisiis"),  # the second is 12
        (['{"ranking":[', "1", ",", "1", ",", "2"], 12, "oisii!"),  # the second stays 1
        (['{"ranking":[', "1", ",", "1", "2", ","], 9, "oisi!!"),
        (['{"ranking":[', "1x", ",", "2"], 2, "oi!!"),
        (['{"ranking":[', "-1", ","], 2, "oi!"),
        (['{"ranking":[', "²", ","], 2, "oi!"),
        (['{"ranking":[', "1", "]]", "x"], 1, "oic!"),
        (['{"ranking":[', "1", "]}", "\n", ".", "."], 1, "oiccc!"),
        (['{"ranking":[', "1", "]}", "}", "}"], 1, "oicc!"),
        (['{"ranking":[', "\xa0", "1"], 1, "oi!"),
    ],
)
def test_the_breaking_token_has_the_class_that_was_due_and_all_after_it_are_stray(
    pieces, num_items, letters
):
    assert class_letters(pieces, num_items) == letters


@pytest.mark.parametrize("kept", range(5))
def test_the_end_of_sequence_closes_a_complete_answer_only(kept):
    pieces = ['{"ranking":[', "1", "]", "}", "\n"][:kept]
    assert class_letters([*pieces, "}"], 1, ended=True)[-1] == "oiccc"[kept]


def test_an_empty_completion_has_no_classes():
    assert class_letters([], 3) == ""
    assert class_letters(["<eos>"], 3, ended=True) == "o"


@functools.cache
def answer_prefixes(num_items):
    """Every beginning of every answer of `num_items` items, written without blanks."""
    answers = itertools.permutations(range(1, num_items + 1))
    texts = ["".join(answer_text(answer).split()) for answer in answers]
    return {text[:end] for text in texts for end in range(len(text) + 1)}


@fuzz_settings
@given(st.integers(1, 4), st.text("123,]}4", max_size=12), st.integers(0, 3))
def test_tokens_have_a_class_up_to_the_first_that_no_answer_has_there(num_items, tail, cut):
    text = OPENING[: len(OPENING) - cut] + tail
    kept = max(end for end in range(len(text) + 1) if text[:end] in answer_prefixes(num_items))
    letters = class_letters(list(text), num_items)
    assert "!" not in letters[: kept + 1]
    assert set(letters[kept + 1 :]) <= {"!"}


@st.composite
def cut_texts(draw, text):
    cuts = sorted(draw(st.sets(st.integers(1, len(text) - 1))))
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


@fuzz_settings
@given(st.data(), rankings)
def test_no_cut_of_a_canonical_answer_has_a_stray_token_or_changes_a_class(data, ranking):
    text = answer_text(ranking)
    pieces = data.draw(cut_texts(text))
    result = scan([*pieces, "<eos>"], len(ranking), ended=True)
    by_char = scan(list(text), len(ranking), ended=False)
    start = 0
    for piece, token_class, unused in zip(pieces, result.classes, result.unused, strict=False):
        first = start + len(piece) - len(piece.lstrip())
        start += len(piece)
        if first < start:
            assert token_class == by_char.classes[first]
            assert unused == by_char.unused[first]
    assert TokenClass.STRAY not in result.classes
    assert result.classes[-1] == TokenClass.CLOSING
    seen = [unused for unused in by_char.unused if unused is not None]
    assert seen == [frozenset(ranking[place:]) for place in range(len(ranking))]


@fuzz_settings
@given(edited_answers(st.sampled_from(' \n0123{}[]:,"r')))
def test_a_text_parses_if_the_end_of_sequence_and_all_before_it_keep_the_contract(edited):
    ranking, text = edited
    # After the end token nothing is allowed: its class alone would not tell whether it was due.
    result = scan([*text, "\n", "<eos>", "<eos>"], len(ranking), ended=False)
    num_kept = int((result.classes != TokenClass.STRAY).sum()) - 1
    keeps = num_kept == len(text) + 1 and result.classes[num_kept] == TokenClass.CLOSING
    is_complete = text.rstrip().endswith("}")
    parses = strict_parse(text, len(ranking), "stop")[0] is not None
    assert parses == (keeps and is_complete)


def test_the_unused_ids_stand_where_the_first_token_of_an_id_is_due():
    pieces = ['{"ranking": [', " ", "1", "1", ",", " 2", ",", "2", ",", "99"]
    every = frozenset(range(1, 13))
    expected = [None] * len(pieces)
    expected[2] = every
    expected[5] = every - {11}
    expected[7] = every - {11, 2}  # where 2 came again; nothing after it counts
    assert scan(pieces, 12, ended=False).unused == expected
    # `, 3` begins no id of its own, and `]` stands where one was due.
    assert scan(['{"ranking": [', "3", ", 1", ",", "]"], 12, ended=False).unused == [
        None,
        every,
        None,
        None,
        every - {3, 1},
    ]


# Tokenizers

KINDS = ["bytes", "merged", "metaspace"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_gives_one_first_token_per_id_and_no_stray(kind):
    tokenizer = build_tokenizer(kind)
    token_text = TokenText(tokenizer, eos_ids={0})
    ranking = (12, 3, 1, 10, 2, 11, 4, 9, 5, 8, 6, 7)
    token_ids = np.array([*tokenizer.encode(answer_text(ranking), False), 0], dtype=np.int32)
    assert token_text.ended(token_ids)
    assert not token_text.ended(token_ids[:-1])
    assert strict_parse(token_text.text(token_ids), 12, "stop") == (ranking, None)
    pieces = token_text.pieces(token_ids)
    assert "".join(pieces[:-1]).strip() == answer_text(ranking)
    result = scan(pieces, 12, token_text.ended(token_ids))
    assert TokenClass.STRAY not in result.classes
    if kind != "metaspace":  # its tokens are words such as `12,` and `[12,`
        assert [len(unused) for unused in result.unused if unused] == list(range(12, 0, -1))


def test_the_pieces_of_a_byte_level_tokenizer_show_split_characters_as_stray():
    tokenizer = build_tokenizer("bytes")
    token_text = TokenText(tokenizer, eos_ids={0})
    token_ids = tokenizer.encode("{é", False)
    pieces = token_text.pieces(token_ids)
    assert pieces == ["{", "\ufffd", "\ufffd"]
    assert token_text.text(token_ids) == "{é"
    assert class_letters(pieces, 3) == "oo!"


def test_other_special_tokens_stay_in_the_text_so_that_they_fail_the_parse():
    tokenizer = build_tokenizer("merged")
    token_ids = [0, *tokenizer.encode(answer_text([1]), False), 0]
    text = TokenText(tokenizer, eos_ids={0}).text(token_ids)
    assert text == '<eos>{"ranking": [1]}'
    assert strict_parse(text, 1, "stop") == (None, "extra_text")


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_are_all_tokens_that_can_begin_an_unused_id(kind):
    tokenizer = build_tokenizer(kind)
    id_tokens = IdTokens(tokenizer, 12)
    texts = TokenText(tokenizer, eos_ids=()).pieces(range(len(tokenizer.get_vocab())))
    for unused in [frozenset({2, 12}), frozenset({3}), frozenset(range(1, 13)), frozenset()]:
        expected = [
            token_id
            for token_id, text in enumerate(texts)
            if text.lstrip(" \t\n\r").isdecimal()
            and any(str(item).startswith(text.lstrip(" \t\n\r")) for item in unused)
        ]
        found = id_tokens.first_tokens(unused)
        assert found.tolist() == expected
        assert np.issubdtype(found.dtype, np.integer)
        assert (len(found) > 0) == (len(unused) > 0)


def test_first_tokens_count_an_id_with_and_without_a_space():
    tokenizer = build_tokenizer("merged")
    found = IdTokens(tokenizer, 12).first_tokens(frozenset({12}))
    texts = TokenText(tokenizer, eos_ids=()).pieces(found)
    assert sorted(texts) == [" 1", " 12", "1", "12"]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('{"ranking": [2, 1, 3]}', None),
        (' {"ranking":[2,1,3]\n} ', None),
        ('{"ranking": [2, 2, 3]}', 16),
        ('{"ranking": [2, 4, 3]}', 16),
        ('{"ranking": [2, 1]}', 17),
        ('{"ranking": [2, 1, 3]', 21),
        ("", 0),
        ('{"ranking": [2, 1, 3]}!', 22),
        ('{"rank": [2, 1, 3]}', 6),
    ],
)
def test_the_first_violation_is_where_a_reader_would_point(text, at):
    assert first_violation(text, 3) == at


@given(rankings, st.data())
@fuzz_settings
def test_a_completion_without_a_violation_is_one_that_parses(ranking, data):
    text = answer_text(ranking)
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 2))
    text = text[:at] + data.draw(st.text('{}[]", 0123456789ranki', max_size=3)) + text[at + cut :]
    at = first_violation(text, len(ranking))
    assert (at is None) == (strict_parse(text, len(ranking), "stop")[1] is None)
    if at is not None and at < len(text):  # what comes before may go on to an answer
        assert first_violation(text[:at], len(ranking)) in (at, None)
        assert first_violation(text[: at + 1] + "?", len(ranking)) == at
