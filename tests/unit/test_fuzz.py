"""Whatever comes in: one clear line or a value that holds what it must. `make fuzz` tries more."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from listopd_ray.config import Config, DataConfig, describe_keys, dump_config, load_config
from listopd_ray.job_config import SearchConfig, StudyConfig
from listopd_ray.rank import RankConfig, read_requests
from listopd_ray.task.amazon import read_products
from listopd_ray.task.contract import strict_parse
from listopd_ray.task.data import Quarantine, read_examples
from listopd_ray.types import ListopdError

fuzz = settings(
    max_examples=int(os.environ.get("LISTOPD_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ROW = {
    "id": "q1",
    "query": "blue boots under $60",
    "items": [{"id": "a", "text": "boots"}, {"id": "b", "text": "hat"}],
    "relevance": [1.0, 0],
}
PRODUCT = {
    "parent_asin": "B0",
    "title": "Blue boots",
    "details": {"Department": "womens"},
    "average_rating": 4.5,
    "rating_number": 12,
    "price": 19.99,
    "store": "Woolly",
}

numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1e400, 10**400, True, 5e-324])
texts = st.text(max_size=20) | st.sampled_from(["", " ", "a", "\x00", "\ud800", "é" * 300])
values = st.recursive(
    st.none() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw, row):
    """A row in which some places, however deep, hold something else, or nothing; or more."""
    row = json.loads(json.dumps(row))
    for _ in range(draw(st.integers(0, 2))):
        place, key = row, draw(st.sampled_from(sorted(row)))
        while draw(st.booleans()) and isinstance(place[key], list | dict) and place[key]:
            place = place[key]
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
        what = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if what == "replace":
            place[key] = draw(values)
        elif what == "remove":
            del place[key]
        elif isinstance(place, list):
            place.append(place[key])
        if not row:
            break
    return row


@st.composite
def lines(draw, row):
    """JSON lines, some of them damaged as objects, some as bytes."""
    written = []
    for _ in range(draw(st.integers(0, 4))):
        raw = json.dumps(draw(damaged(row))).encode()
        if draw(st.integers(0, 3)) == 0:
            at, more = draw(st.integers(0, len(raw))), draw(st.binary(max_size=6))
            raw = raw[:at] + more + raw[at + draw(st.integers(0, 6)) :]
        written.append(raw)
    return b"\n".join(written)


def is_text(value):
    try:
        return isinstance(value, str) and bool(value.strip()) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_gain(value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= 1.7976931348623157e308


def is_example(row, relevance_may_be_missing=False):
    """Said a second time, in other words than the reader's."""
    if not isinstance(row, dict) or not (is_text(row.get("id")) and is_text(row.get("query"))):
        return False
    items, relevance = row.get("items"), row.get("relevance")
    if not isinstance(items, list) or len(items) < 2:
        return False
    if not all(
        isinstance(i, dict) and is_text(i.get("id")) and is_text(i.get("text")) for i in items
    ):
        return False
    if len({i["id"] for i in items}) != len(items):
        return False
    if relevance is None:
        return relevance_may_be_missing
    return (
        isinstance(relevance, list)
        and len(relevance) == len(items)
        and all(map(is_gain, relevance))
    )


def good_rows(content, is_good, key="id"):
    """Of the lines that are strictly JSON and hold what they must, the first of each id."""

    def no_constant(name):
        raise ValueError(name)

    def unique(pairs):
        if len({k for k, _ in pairs}) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    found = {}
    for raw in content.split(b"\n"):
        try:
            row = json.loads(raw.decode(), parse_constant=no_constant, object_pairs_hook=unique)
        except (ValueError, RecursionError):
            continue
        if is_good(row):
            found.setdefault(row[key], row)
    return found


def same(example, row):
    pairs = [(item.id, item.text) for item in example.items]
    assert (example.id, example.query) == (row["id"], row["query"])
    assert pairs == [(item["id"], item["text"]) for item in row["items"]]
    if row.get("relevance") is not None:
        assert list(example.relevance) == [float(value) for value in row["relevance"]]


@fuzz
@given(content=lines(ROW), zipped=st.booleans())
def test_the_example_reader_takes_what_is_an_example_and_nothing_else(tmp_path, content, zipped):
    file = tmp_path / ("x.jsonl.gz" if zipped else "x.jsonl")
    file.write_bytes(gzip.compress(content) if zipped else content)
    good = good_rows(content, is_example)
    try:
        examples = read_examples(file, max_bad_rows=1000)
    except ListopdError as error:
        assert "\n" not in str(error)
        assert not good
    else:
        assert [example.id for example in examples] == list(good)
        for example, row in zip(examples, good.values(), strict=True):
            same(example, row)


@fuzz
@given(content=st.binary(max_size=60))
def test_a_file_that_is_something_else_is_one_line(tmp_path, content):
    for name in ("x.jsonl", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ListopdError) as raised:
            read_examples(tmp_path / name, max_bad_rows=1000)
        assert "\n" not in str(raised.value)


@fuzz
@given(content=lines(ROW))
def test_the_request_reader_too(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    config = RankConfig(data=DataConfig(max_bad_rows=1000))
    good = good_rows(content, lambda row: is_example(row, relevance_may_be_missing=True))
    try:
        examples = read_requests(tmp_path / "x.jsonl", config, lambda example: None)
    except ListopdError as error:
        assert "\n" not in str(error)
        assert not good
    else:
        assert [example.id for example in examples] == list(good)
        for example, row in zip(examples, good.values(), strict=True):
            same(example, row)


@fuzz
@given(content=lines(PRODUCT))
def test_the_product_reader_gives_only_products_that_hold_what_they_must(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(content)
    with Quarantine(None, 1000) as bad:
        products = read_products(tmp_path / "x.jsonl", 12, bad)
    rows = good_rows(
        content,
        lambda row: isinstance(row, dict) and is_text(row.get("parent_asin")),
        "parent_asin",
    )
    written = [line for line in content.split(b"\n") if line.strip()]
    assert len(products) + bad.count == len(written)
    for asin, product in products.items():
        assert asin in rows and product.title.strip() and len(product.title.split(" ")) <= 12
        assert product.rating is None or 0 <= product.rating <= 5
        assert product.price is None or product.price >= 1
        assert product.num_ratings >= 0 and product.store != ""


PIECES = (
    '{"ranking": [|{|}|[|]|,|, |:|"ranking"|"| |\n|\u00a0|'
    "1|2|3|4|0|01|-1|1.0|1e0|true|null|NaN|١|²|x"
)
fragments = st.sampled_from(PIECES.split("|"))
answers = st.lists(fragments, max_size=14).map("".join) | st.permutations([1, 2, 3]).map(
    lambda ranking: json.dumps({"ranking": list(ranking)})
)
SPACE = r"[ \t\n\r]*"
NUMBER = r"(0|[1-9][0-9]*)"
CONTRACT = re.compile(
    SPACE.join(["", r"\{", '"ranking"', ":", r"\[", NUMBER + f"(?:{SPACE},{SPACE}{NUMBER})*"])
    + SPACE.join(["", r"\]", r"\}", ""])
)


@fuzz
@given(
    text=answers,
    at=st.integers(0, 30),
    more=st.text(alphabet=st.characters(exclude_characters="\\"), max_size=2),
    cut=st.integers(0, 2),
)
def test_the_strict_parser_takes_the_contract_and_nothing_else(text, at, more, cut):
    for answer in (text, text[:at] + more + text[at + cut :]):
        numbers = re.findall(r"[0-9]+", answer)
        expected = CONTRACT.fullmatch(answer) and sorted(numbers) == ["1", "2", "3"]
        ranking, reason = strict_parse(answer, 3, "stop")
        assert (ranking is None) == (reason is not None) == (not expected), (answer, ranking)
        if ranking is not None:
            assert list(ranking) == [int(number) for number in numbers]
        assert strict_parse(answer, 3, "length") == (None, "truncated")


KEYS = [key for key, _, _ in describe_keys(Config)]
ODD = (
    "|null|true|1|-1|0|0.5|1e-3|.inf|-.inf|.nan|1e400|auto|cpu|vllm|plain|x|a/b|[1, 2]|[|{a: 1}|{"
    "|'|${lr}|${x}|!!python/x 1|00|0x10|1_000|2026-01-01|yes|~|&a|*a|\ud800|1" + 30 * "0"
)
wrong_keys = st.sampled_from(["", "lrr", "data", "student.warmstart", "a.b.c", "lr."])
arguments = st.tuples(
    st.sampled_from(KEYS) | wrong_keys, st.sampled_from(ODD.split("|")) | st.text(max_size=8)
).map("=".join)


def check_loaded(schema, given_arguments):
    try:
        config = load_config(schema, given_arguments)
    except ListopdError as error:
        assert str(error).strip() and "\n" not in str(error), str(error)
        return
    assert isinstance(config, schema)
    assert config.clip > 1 and config.lr > 0 and math.isfinite(config.lr)
    assert isinstance(config.num_steps, int) and config.num_steps >= 1
    assert isinstance(config.num_prompts, int) and isinstance(config.tracking.wandb, bool)
    assert 0 <= config.seed < 1 << 63


@fuzz
@given(given_arguments=st.lists(arguments, max_size=3))
def test_the_configuration_takes_what_is_valid_and_says_what_is_not(given_arguments):
    check_loaded(Config, given_arguments)


@fuzz
@given(
    content=st.dictionaries(
        st.sampled_from(KEYS).map(lambda key: key.split(".")[0]) | texts, values, max_size=3
    )
    .map(json.dumps)
    .map(str.encode)
    | st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    schema=st.sampled_from([Config, SearchConfig, StudyConfig]),
)
def test_so_do_its_files(tmp_path, content, schema):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    check_loaded(schema, [str(file)])


def test_what_was_taken_is_written_as_it_is_read(tmp_path: Path):
    config = load_config(Config, ["lr=1e-4", "clip=.inf", "lam=auto", "clip=3", "name=é"])
    (tmp_path / "x.yaml").write_text(dump_config(config))
    assert load_config(Config, [str(tmp_path / "x.yaml")]) == config
