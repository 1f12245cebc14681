"""Examples on their way in: the splits of a run, and the rows that `listopd rank` reads."""

import json

import pytest

from listopd_ray.config import Config, load_config
from listopd_ray.rank import RankConfig, read_requests
from listopd_ray.splits import load_split
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic
from listopd_ray.types import ListopdError

ROW = {"id": "a", "query": "socks", "items": [{"id": "x", "text": "1"}, {"id": "y", "text": "2"}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_over_long_prompts_are_set_aside_with_line_and_reason(tmp_path, tokenizer, capsys):
    write_synthetic(SyntheticConfig(out=str(tmp_path), num_items=3, num_train=20, num_eval=5))
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    long = json.loads(lines[2])
    long["query"] = "socks " * 50
    lines[2] = json.dumps(long)
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = load_config(Config, [f"data.path={tmp_path}", "data.max_prompt_tokens=40"])
    split = load_split(config, "train", tokenizer)
    assert len(split.examples) == len(split.prompts) == 19
    assert [p.id for p in split.prompts] == [e.id for e in split.examples]
    (entry,) = (tmp_path / "train.quarantine.jsonl").read_text().splitlines()
    assert json.loads(entry)["line"] == 3
    assert "limit 40" in json.loads(entry)["reason"]
    assert "1 bad rows set aside" in capsys.readouterr().err
    strict = load_config(
        Config, [f"data.path={tmp_path}", "data.max_prompt_tokens=40", "data.max_bad_rows=0"]
    )
    with pytest.raises(ListopdError, match=r"train\.jsonl:3: prompt of"):
        load_split(strict, "train", tokenizer)


def test_a_request_needs_no_relevance(tmp_path):
    rows = [ROW, ROW | {"id": "b", "relevance": None}, ROW | {"id": "c", "relevance": [1, 0]}]
    requests = read_requests(write(tmp_path / "in", rows), RankConfig(), lambda example: None)
    assert [request.relevance for request in requests] == [(0, 0), (0, 0), (1, 0)]


def test_requests_that_cannot_be_used_are_counted_with_the_first_ones_line(tmp_path, capsys):
    rows = [ROW, ROW, ROW | {"id": "b", "items": 3}, ROW | {"id": "c", "query": "long"}]
    refuse = lambda example: "too long" if example.query == "long" else None  # noqa: E731
    file = write(tmp_path / "in", rows)
    assert len(read_requests(file, RankConfig(), refuse)) == 1
    message = capsys.readouterr().err
    assert "3 bad rows" in message
    assert f"{file}:2: duplicate id 'a'" in message
    with pytest.raises(ListopdError, match="first of 3"):
        read_requests(file, load_config(RankConfig, ["data.max_bad_rows=2"]), refuse)
