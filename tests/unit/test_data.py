import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from listopd_ray.task import data
from listopd_ray.task.data import (
    MAX_LINE_BYTES,
    PromptStream,
    Quarantine,
    dataset_hash,
    read_examples,
    read_rows,
    split_by_query,
    write_dataset,
)
from listopd_ray.types import Example, Item, ListopdError, Prompt


def row(number=1, **changes):
    items = [{"id": "a", "text": "socks $3"}, {"id": "b", "text": "belt $5"}]
    good = {"id": f"e{number}", "query": "socks", "items": items, "relevance": [1, 0.5]}
    return {**good, **changes}


def example(number, query="socks"):
    items = (Item(id="a", text="söcks"), Item(id="b", text="belt"))
    return Example(id=f"e{number}", query=query, items=items, relevance=(1.0, 1 / 3))


def write_lines(path, *lines):
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def test_a_good_row_is_read_as_it_is(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", row(), b"", row(2, extra="ignored"))
    first, second = read_examples(path, max_bad_rows=0)
    assert first == Example(
        id="e1",
        query="socks",
        items=(Item(id="a", text="socks $3"), Item(id="b", text="belt $5")),
        relevance=(1.0, 0.5),
    )
    assert [type(gain) for gain in first.relevance] == [float, float]
    assert second.id == "e2"


def test_a_row_may_name_its_teacher_and_keeps_the_name(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", row(teacher="code"), row(2, teacher=None), row(3))
    examples = read_examples(path, max_bad_rows=0)
    assert [example.teacher for example in examples] == ["code", None, None]
    write_dataset(tmp_path / "out", {"train": examples, "eval": examples[2:]}, {})
    written = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert ["teacher" in json.loads(line) for line in written] == [True, False, False]
    again = read_examples(tmp_path / "out" / "train.jsonl", max_bad_rows=0)
    assert again == examples


def text(**changes):
    return json.dumps(row(2, **changes)).encode()


TWO_ITEMS = row()["items"]
BAD_ROWS = {
    "not JSON": b"{",
    "not a JSON object": b"[1]",
    "id: missing": text().replace(b'"id": "e2", ', b""),
    "id: int where str is due": text(id=1),
    "id: empty": text(id=" "),
    "query: NoneType where str is due": text(query=None),
    "query: lone surrogate": text(query="\ud800"),
    "items: dict where list is due": text(items={}),
    "items: not an object": text(items=["a", "b"]),
    "items: fewer than 2": text(items=TWO_ITEMS[:1], relevance=[1]),
    "items: duplicate id": text(items=[TWO_ITEMS[0]] * 2),
    "text: empty": text(items=[TWO_ITEMS[0], {"id": "b", "text": " \n"}]),
    "relevance: 3 values for 2 items": text(relevance=[1, 2, 3]),
    "relevance: not a number": text(relevance=[True, 0]),
    "relevance: not finite and ≥ 0": text(relevance=[-0.5, 0]),
    "NaN is not JSON": text(relevance=[float("nan"), 0]),
    "-Infinity is not JSON": text(relevance=[-float("inf"), 0]),
    "line longer": text(query="x" * MAX_LINE_BYTES),
    "nested too deep": b"[" * 200_000,
    "not UTF-8": text().replace(b"socks", b"\xff"),
    "an object has the same key twice": text().replace(b'{"id"', b'{"query": "", "id"', 1),
    "teacher: int where str is due": text(teacher=3),
    "teacher: empty": text(teacher=" "),
}


@pytest.mark.parametrize(("reason", "line"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_row_is_quarantined_with_its_reason(tmp_path, reason, line):
    path = write_lines(tmp_path / "train.jsonl", row(), line, row(3))
    side = tmp_path / "side" / "quarantine.jsonl"
    examples = read_examples(path, max_bad_rows=1, quarantine=side)
    assert [good.id for good in examples] == ["e1", "e3"]
    (entry,) = [json.loads(line) for line in side.read_text("utf-8").splitlines()]
    assert (entry["file"], entry["line"]) == (str(path), 2)
    assert entry["reason"].startswith(reason)
    assert entry["row"] == line.decode(errors="replace")[:2000]


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400, "9" * 5000])
def test_a_number_too_large_for_a_float_is_a_bad_row(tmp_path, number):
    line = text().replace(b"0.5", number.encode())
    path = write_lines(tmp_path / "train.jsonl", row(), line)
    assert len(read_examples(path, max_bad_rows=1)) == 1
    with pytest.raises(ListopdError):
        read_examples(path, max_bad_rows=0)


def test_a_duplicate_id_is_quarantined_with_its_line_number(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", row(1), row(2), row(1))
    side = tmp_path / "quarantine.jsonl"
    assert len(read_examples(path, max_bad_rows=1, quarantine=side)) == 2
    assert json.loads(side.read_text())["line"] == 3
    assert json.loads(side.read_text())["reason"] == "duplicate id 'e1'"


def test_a_rejected_example_is_quarantined_with_the_given_reason(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", row(1), row(2, query="long"))
    side = tmp_path / "quarantine.jsonl"
    (kept,) = read_examples(
        path,
        max_bad_rows=1,
        quarantine=side,
        reject=lambda example: "prompt too long" if example.query == "long" else None,
    )
    assert kept.id == "e1"
    assert json.loads(side.read_text())["reason"] == "prompt too long"


def test_too_many_bad_rows_stop_with_one_line_that_says_where(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", row(), b"{", row(2), b"{", b"{")
    side = tmp_path / "quarantine.jsonl"
    with pytest.raises(ListopdError) as caught:
        read_examples(path, max_bad_rows=2, quarantine=side)
    message = str(caught.value)
    assert f"{path}:2: not JSON" in message
    assert "3 bad rows" in message and "max_bad_rows is 2" in message and str(side) in message
    assert "\n" not in message
    assert len(side.read_text().splitlines()) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [side.name, path.name]


def test_good_data_leave_no_side_file(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", row())
    read_examples(path, max_bad_rows=0, quarantine=tmp_path / "quarantine.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("lines", [[], [b"", b" "], [b"{", b"{"]])
def test_a_file_without_a_usable_row_is_an_error(tmp_path, lines):
    path = write_lines(tmp_path / "train.jsonl", *lines)
    with pytest.raises(ListopdError, match="no usable example"):
        read_examples(path, max_bad_rows=9)


def test_a_missing_file_and_a_directory_are_errors(tmp_path):
    with pytest.raises(ListopdError, match="No such file"):
        read_examples(tmp_path / "absent.jsonl", max_bad_rows=0)
    with pytest.raises(ListopdError, match="directory"):
        read_examples(tmp_path, max_bad_rows=0)


def test_a_line_of_the_longest_allowed_length_is_read_and_one_byte_more_is_not(tmp_path):
    room = MAX_LINE_BYTES - len(text(query=""))
    lines = [text(query="x" * room), json.dumps(row(3, query="x" * (room + 1))).encode(), row(4)]
    assert [len(line) - MAX_LINE_BYTES for line in lines[:2]] == [0, 1]
    path = write_lines(tmp_path / "train.jsonl", *lines)
    assert [good.id for good in read_examples(path, max_bad_rows=1)] == ["e2", "e4"]


def test_a_truncated_or_false_gzip_file_is_an_error(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (whole[: len(whole) // 2], b"plain text", whole[:20] + b"\0" * 9 + whole[29:]):
        path = tmp_path / "meta.jsonl.gz"
        path.write_bytes(content)
        with Quarantine(None, 0) as bad, pytest.raises(ListopdError, match=r"meta\.jsonl\.gz"):
            list(read_rows(path, lambda row: row, bad))


good_lines = st.integers(0, 3).map(lambda number: json.dumps(row(number)).encode())
json_lines = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "query", "items", "relevance", "text"]), inner)
    ),
    max_leaves=10,
)
broken_rows = st.builds(
    lambda key, value: json.dumps(row(9, **{key: value})).encode(),
    st.sampled_from(["id", "query", "items", "relevance"]),
    json_lines | st.lists(st.floats() | st.integers(), min_size=2, max_size=2),
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(st.binary(max_size=60) | good_lines | broken_rows, max_size=6))
def test_no_bytes_crash_the_reader_or_pass_as_a_broken_example(tmp_path, lines):
    path = write_lines(tmp_path / "fuzz.jsonl", *lines)
    try:
        examples = read_examples(path, max_bad_rows=3, quarantine=tmp_path / "quarantine.jsonl")
    except ListopdError as error:
        assert "\n" not in str(error)
        return
    assert len({good.id for good in examples}) == len(examples) > 0
    for good in examples:
        assert len(good.items) == len(good.relevance) >= 2
        assert len({item.id for item in good.items}) == len(good.items)
        assert np.isfinite(good.relevance).all() and min(good.relevance) >= 0
        texts = [
            good.id,
            good.query,
            *(text for item in good.items for text in (item.id, item.text)),
        ]
        assert all(type(text) is str and text.strip() and text.encode() for text in texts)


def test_a_written_dataset_reads_back_and_repeats_byte_for_byte(tmp_path):
    splits = {"train": [example(1), example(2, "größer")], "eval": [example(3, "belt")]}
    for out in (tmp_path / "a", tmp_path / "deep" / "b"):
        write_dataset(out, splits, {"settings": {"seed": 7}})
        assert {entry.name for entry in out.iterdir()} == {
            "train.jsonl",
            "eval.jsonl",
            "dataset.json",
        }
        for split in ("train", "eval"):
            assert read_examples(out / f"{split}.jsonl", max_bad_rows=0) == splits[split]
    for name in ("train.jsonl", "eval.jsonl", "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "deep" / "b" / name).read_bytes()
    assert "größer" in (tmp_path / "a" / "train.jsonl").read_text("utf-8")
    record = json.loads((tmp_path / "a" / "dataset.json").read_text("utf-8"))
    assert record["num_examples"] == {"train": 2, "eval": 1}
    assert record["settings"] == {"seed": 7}
    assert len(record["sha256"]["eval"]) == 64


def test_the_dataset_hash_changes_with_either_split_and_with_nothing_else(tmp_path):
    def hash_of(train, held_out, meta):
        write_dataset(tmp_path, {"train": train, "eval": held_out}, meta)
        return dataset_hash(tmp_path)

    first = hash_of([example(1)], [example(2)], {})
    assert hash_of([example(1)], [example(2)], {"note": "other"}) == first
    assert hash_of([example(1)], [example(3)], {}) != first
    assert hash_of([example(3)], [example(2)], {}) != first
    assert hash_of([example(1), example(2)], [example(3)], {}) != hash_of(
        [example(1)], [example(2), example(3)], {}
    )
    (tmp_path / "eval.jsonl").unlink()
    with pytest.raises(ListopdError, match=r"eval\.jsonl"):
        dataset_hash(tmp_path)


def test_a_dataset_cannot_be_written_where_a_file_is(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ListopdError, match="taken"):
        write_dataset(tmp_path / "taken", {"train": [], "eval": []}, {})


def test_splits_share_no_query_and_follow_the_seed():
    examples = [example(number, query=f"query {number % 40}") for number in range(200)]
    splits = split_by_query(examples, num_eval=50, seed=0)
    train, held_out = splits["train"], splits["eval"]
    assert len(held_out) == 50 and len(train) == 150
    assert not {one.query for one in train} & {one.query for one in held_out}
    assert split_by_query(examples, num_eval=50, seed=0) == splits
    assert split_by_query(examples, num_eval=50, seed=1) != splits
    for chosen in (train, held_out):
        assert [one.id for one in chosen] == sorted(
            (one.id for one in chosen), key=lambda i: int(i[1:])
        )


def test_the_membership_of_a_query_does_not_depend_on_the_order_of_the_examples():
    examples = [example(number, query=f"query {number}") for number in range(60)]
    forward = split_by_query(examples, num_eval=20, seed=3)["eval"]
    backward = split_by_query(examples[::-1], num_eval=20, seed=3)["eval"]
    assert {one.query for one in forward} == {one.query for one in backward}


def test_a_query_too_frequent_for_eval_stays_in_train():
    examples = [example(number, "socks" if number < 30 else f"q{number}") for number in range(40)]
    splits = split_by_query(examples, num_eval=7, seed=0)
    assert len(splits["eval"]) == 7
    assert "socks" not in {one.query for one in splits["eval"]}
    with pytest.raises(ListopdError, match="no example for eval"):
        split_by_query(examples[:30], num_eval=10, seed=0)
    with pytest.raises(ListopdError, match="no example for train"):
        split_by_query(examples[:30], num_eval=30, seed=0)


def prompts(n):
    return [Prompt(id=f"e{i}", token_ids=np.zeros(1, np.int32), num_items=2) for i in range(n)]


def ids(taken):
    return [prompt.id for prompt in taken]


def test_every_epoch_shows_every_prompt_once_in_an_order_of_its_own():
    stream = PromptStream(prompts(10), seed=0)
    drawn = ids(stream.take(7)) + ids(stream.take(13)) + ids(stream.take(10))
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == sorted(ids(prompts(10))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(PromptStream(prompts(10), seed=0).take(30)) == drawn
    assert ids(PromptStream(prompts(10), seed=1).take(30)) != drawn


@pytest.mark.parametrize("before", [0, 3, 10, 25])
def test_a_restored_stream_goes_on_as_the_uninterrupted_one(before):
    whole = PromptStream(prompts(10), seed=5)
    whole.take(before)
    state = json.loads(json.dumps(whole.state()))
    resumed = PromptStream(prompts(10), seed=5)
    resumed.take(4)
    resumed.restore(state)
    assert ids(resumed.take(24)) == ids(whole.take(24))
    assert resumed.state() == whole.state()


def test_a_stream_refuses_the_state_of_other_data_and_an_empty_list():
    stream = PromptStream(prompts(4), seed=0)
    with pytest.raises(ListopdError, match="not that of the checkpoint"):
        stream.restore({"epoch": 0, "position": 4})
    with pytest.raises(ListopdError, match="no prompts"):
        PromptStream([], seed=0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_how_far_a_file_is_read_adds_up_to_its_bytes(tmp_path, name, monkeypatch):
    monkeypatch.setattr(data, "ADVANCE_LINES", 3)
    path, seen = tmp_path / name, []
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt") as stream:
        stream.writelines(f'{{"n": {n}}}\n' for n in range(10))
    with Quarantine(None, 0) as bad:
        assert len(list(read_rows(path, lambda row: row, bad, seen.append))) == 10
    assert sum(seen) == path.stat().st_size
    assert len(seen) == 4 and min(seen) >= 0
