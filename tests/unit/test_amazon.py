import gzip
import json
import os
from math import log1p
from pathlib import Path

import pytest

from listopd_ray.task.amazon import (
    AmazonConfig,
    Product,
    Shopper,
    find_department,
    item_text,
    parse_product,
    query_text,
    rubric,
    write_amazon,
)
from listopd_ray.task.data import BadRow, dataset_hash, read_examples
from listopd_ray.types import ListopdError


def meta_row(number=0, **changes):
    departments = ("Womens", "mens", "Unisex Adult", "Girls")
    return {
        "parent_asin": f"B{number:03d}",
        "title": f"Brand{number} Warm Wool Winter Socks Pack",
        "average_rating": 3.0 + number % 20 / 10,
        "rating_number": 7 * number,
        "price": None if number % 3 == 0 else 5.99 + number,
        "store": f"Brand{number}",
        "details": {"Department": departments[number % 4]},
        **changes,
    }


def review(user, number, time):
    return {"user_id": user, "parent_asin": f"B{number:03d}", "timestamp": time, "rating": 5.0}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def meta(tmp_path):
    return write_rows(tmp_path / "meta.jsonl", [meta_row(number) for number in range(60)])


def read_splits(out):
    return {
        split: read_examples(Path(out) / f"{split}.jsonl", max_bad_rows=0)
        for split in ("train", "eval")
    }


def product(**changes):
    fields = {
        "asin": "B1",
        "title": "Wool Socks",
        "department": "women",
        "price": 11,
        "rating": 4.8,
        "num_ratings": 69,
        "store": "Woolly",
    }
    return Product(**{**fields, **changes})


def test_a_real_row_becomes_a_short_text():
    row = {
        "parent_asin": "B092J63RBK",
        "title": "LassZone\tCanvas  Cute\x07 Crossbody Handbags for Women Girls",
        "average_rating": 4.8,
        "rating_number": 69,
        "price": 10.99,
        "store": "LassZone",
        "details": {"Department": "Girls"},
    }
    parsed = parse_product(row, max_title_words=4)
    assert item_text(parsed) == "LassZone Canvas Cute Crossbody girls' $11 4.8 (69)"
    assert parsed.store == "LassZone"


def test_a_row_with_little_more_than_a_title_is_a_product():
    parsed = parse_product({"parent_asin": "B1", "title": "Hat Pin", "price": None}, 4)
    assert item_text(parsed) == "Hat Pin"
    assert (parsed.department, parsed.price, parsed.rating, parsed.num_ratings) == (None,) * 3 + (
        0,
    )


@pytest.mark.parametrize(
    ("price", "shown"),
    [
        (10.99, 11),
        ("10.99", 11),
        ("$8", 8),
        (0.2, 1),
        (0, None),
        ("from 9.99", None),
        ("None", None),
    ],
)
def test_a_price_is_whole_dollars_or_unknown(price, shown):
    assert parse_product(meta_row(price=price), 4).price == shown


@pytest.mark.parametrize(
    "changes",
    [
        {"parent_asin": None},
        {"title": ""},
        {"title": "\x07 \u200b"},
        {"title": 3},
        {"price": True},
        {"price": [1]},
        {"average_rating": 7.0},
        {"rating_number": -1},
        {"rating_number": 10**400},
        {"store": 5},
        {"details": "text"},
    ],
)
def test_a_row_of_the_wrong_shape_is_bad(changes):
    with pytest.raises(BadRow):
        parse_product(meta_row(**changes), 4)


@pytest.mark.parametrize(
    ("text", "department"),
    [
        ("Womens", "women"),
        ("unisex-adult (luggage only)", "unisex"),
        ("Unisex-child", "kids"),
        ("baby-girls", "baby"),
        ("Neilyoshop Men's Elf Costume", "men"),
        ("Women’s Yoga Shorts", "women"),
        ("Small Bags for Women Girls", "women"),
        ("Crew Socks for Women or Men", "unisex"),
        ("Shades for Boys & Girls", "kids"),
        ("Spider Man Mask", None),
        ("Mentor Amendment", None),
        ("necklaces and pendants", None),
    ],
)
def test_the_department_is_found_by_whole_words(text, department):
    assert find_department(text) == department


def test_the_department_of_the_title_serves_where_details_do_not():
    row = meta_row(title="Wool Scarf for Ladies", details={"Department": "HeShengFactory"})
    assert parse_product(row, 2).department == "women"


def test_the_rubric_is_the_documented_weighted_mean():
    shopper = Shopper(department="women", budget=12, store="Woolly")
    quality = ((4.8 * 69 + 4.0 * 20) / 89 - 1) / 4
    popularity = log1p(69) / log1p(1000)
    expected = (4 * 1 + 3 * 1 + 2 * 1 + 2 * quality + popularity) / 12
    assert rubric(shopper, product(), 4.0, 1000) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("shopper", "changes", "lost"),
    [
        (Shopper(department="women"), {"department": "men"}, 4 / 7),
        (Shopper(department="women"), {"department": "unisex"}, 2 / 7),
        (Shopper(department="women"), {"department": None}, 2 / 7),
        (Shopper(budget=11), {"price": 12}, 3 / 6),
        (Shopper(budget=11), {"price": None}, 1.5 / 6),
        (Shopper(store="Woolly"), {"store": "Other"}, 2 / 5),
        (Shopper(), {"price": 99, "department": None, "store": None}, 0),
    ],
)
def test_a_missed_wish_costs_its_share_and_what_is_not_asked_for_costs_nothing(
    shopper, changes, lost
):
    cost = rubric(shopper, product(), 4.0, 1000) - rubric(shopper, product(**changes), 4.0, 1000)
    assert cost == pytest.approx(lost, abs=2e-4)


def test_a_single_top_rating_counts_less_than_many_good_ones():
    lone = rubric(Shopper(), product(rating=5.0, num_ratings=1), 4.0, 1000)
    proven = rubric(Shopper(), product(rating=4.8, num_ratings=69), 4.0, 1000)
    unrated = rubric(Shopper(), product(rating=None, num_ratings=0), 4.0, 1000)
    assert unrated == pytest.approx(2 / 3 * (4.0 - 1) / 4, abs=1e-4)
    assert proven > lone > unrated


def test_relevance_stays_within_zero_and_one():
    best = product(rating=5.0, num_ratings=10**6)
    worst = product(rating=0.0, num_ratings=10**6, department="men", price=99, store=None)
    shopper = Shopper(department="women", budget=12, store="Woolly")
    assert 0.99 < rubric(shopper, best, 4.0, 10**6) <= 1
    assert 0 <= rubric(shopper, worst, 4.0, 10**6) < 0.1
    # An average below one star counts as one star: only the popularity is left.
    assert rubric(Shopper(), worst, 4.0, 10**6) == pytest.approx(1 / 3, abs=1e-4)


def test_a_query_names_what_the_shopper_wants():
    assert query_text(Shopper(department="women", budget=30)) == "women's, under $30"
    assert query_text(Shopper(department="kids", store="Acme")) == "kids', by Acme"
    assert query_text(Shopper()) == "best rated"


def test_metadata_alone_give_splits_of_the_asked_size_without_a_common_query(tmp_path, meta):
    cfg = AmazonConfig(meta=meta, out=str(tmp_path / "out"), num_train=400, num_eval=50)
    summary = write_amazon(cfg)
    assert "400 train and 50 eval" in summary and "\n" not in summary
    splits = read_splits(cfg.out)
    train, held_out = splits["train"], splits["eval"]
    assert not {one.query for one in train} & {one.query for one in held_out}
    for example in train + held_out:
        assert len(example.items) == 6
        assert all(0 <= gain <= 1 for gain in example.relevance)
    assert any(", by Brand" in example.query for example in train)
    best = [example.relevance.index(max(example.relevance)) for example in train]
    assert {best.count(position) > 20 for position in range(6)} == {True}  # nowhere in particular


def test_the_same_files_and_seed_give_the_same_bytes(tmp_path, meta):
    sizes = {"num_train": 60, "num_eval": 10}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_amazon(AmazonConfig(meta=meta, out=str(tmp_path / name), seed=seed, **sizes))
    assert dataset_hash(tmp_path / "a") == dataset_hash(tmp_path / "b")
    assert dataset_hash(tmp_path / "a") != dataset_hash(tmp_path / "c")
    records = [(tmp_path / name / "dataset.json").read_bytes() for name in "ab"]
    assert records[0] == records[1]


def test_a_compressed_file_gives_what_the_plain_one_gives(tmp_path, meta):
    packed = tmp_path / "meta.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(meta).read_bytes()))
    for name, path in (("a", meta), ("b", str(packed))):
        cfg = AmazonConfig(meta=path, out=str(tmp_path / name), num_train=60, num_eval=10)
        write_amazon(cfg)
    assert dataset_hash(tmp_path / "a") == dataset_hash(tmp_path / "b")


def test_bad_rows_of_both_files_are_quarantined_and_counted(tmp_path):
    meta_rows = [meta_row(number) for number in range(20)]
    meta_rows[3] = {"title": "no number"}
    meta_rows[5] = meta_row(4)
    meta = write_rows(tmp_path / "meta.jsonl", meta_rows)
    rows = [review(f"u{user}", user + 6 + time, time) for user in range(8) for time in (1, 2)]
    rows[1] = {**rows[1], "timestamp": "noon"}
    reviews = write_rows(tmp_path / "reviews.jsonl", rows)
    cfg = AmazonConfig(meta=meta, reviews=reviews, out=str(tmp_path / "out"), max_bad_rows=3)
    assert "3 bad rows" in write_amazon(cfg)
    entries = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [(entry["file"], entry["line"]) for entry in entries] == [
        (meta, 4),
        (meta, 6),
        (reviews, 2),
    ]
    assert entries[1]["reason"] == "duplicate parent_asin 'B004'"
    strict = AmazonConfig(meta=meta, reviews=reviews, out=cfg.out, max_bad_rows=2)
    with pytest.raises(ListopdError, match="3 bad rows"):
        write_amazon(strict)


def test_a_history_ranks_the_last_purchase_above_products_never_bought(tmp_path, meta):
    rows = []
    for user in range(40):
        bought = [(user + 7 * turn) % 60 for turn in range(5)]
        rows += [review(f"u{user}", number, 100 + turn) for turn, number in enumerate(bought)]
        rows.append(review(f"u{user}", bought[0], 999))  # again: no new purchase
        rows.append(review(f"u{user}", 777, 1000))  # not in the metadata
    rows.append(review("once", 1, 5))
    rows.append(review("stranger", 777, 5))
    reviews = write_rows(tmp_path / "reviews.jsonl", rows[::-1])  # time orders, not the file
    cfg = AmazonConfig(
        meta=meta, reviews=reviews, out=str(tmp_path / "out"), num_train=35, num_eval=5
    )
    assert "40 purchase histories (2 users skipped)" in write_amazon(cfg)
    splits = read_splits(cfg.out)
    assert (len(splits["train"]), len(splits["eval"])) == (35, 5)

    histories = {}
    for user in range(40):
        bought = [(user + 7 * turn) % 60 for turn in range(5)]
        query = "; ".join(f"Brand{number} Warm Wool Winter" for number in bought[1:4])
        histories[query] = [f"B{number:03d}" for number in bought]
    positions = []
    for example in splits["train"] + splits["eval"]:
        bought = histories[example.query]
        assert sorted(example.relevance) == [0, 0, 0, 0, 0, 1]
        positions.append(example.relevance.index(1))
        assert example.items[positions[-1]].id == bought[4]
        assert [item.id for item in example.items if item.id in bought] == [bought[4]]
    assert len(set(positions)) == 6


def test_fewer_users_than_asked_for_shrink_both_splits(tmp_path, meta):
    rows = [review(f"u{user}", user + turn, turn) for user in range(20) for turn in range(3)]
    reviews = write_rows(tmp_path / "reviews.jsonl", rows)
    out = str(tmp_path / "out")
    write_amazon(AmazonConfig(meta=meta, reviews=reviews, out=out, num_train=3000, num_eval=1000))
    splits = read_splits(out)
    assert (len(splits["train"]), len(splits["eval"])) == (15, 5)


def test_what_is_missing_is_said_in_one_line(tmp_path, meta):
    out = str(tmp_path / "out")
    few = write_rows(tmp_path / "few.jsonl", [meta_row(number) for number in range(5)])
    lonely = write_rows(tmp_path / "lonely.jsonl", [review("u", 1, 1)])
    cases = {
        "give meta=FILE": AmazonConfig(out=out),
        "No such file": AmazonConfig(meta=str(tmp_path / "absent"), out=out),
        "5 usable products for lists of 6": AmazonConfig(meta=few, out=out),
        "no user with two purchases": AmazonConfig(meta=meta, reviews=lonely, out=out),
        "num_items": AmazonConfig(meta=meta, out=out, num_items=1),
    }
    for message, cfg in cases.items():
        with pytest.raises(ListopdError, match=message):
            write_amazon(cfg)


@pytest.mark.skipif("LISTOPD_META" not in os.environ, reason="LISTOPD_META names no metadata file")
def test_real_metadata_give_the_default_dataset(tmp_path):
    cfg = AmazonConfig(meta=os.environ["LISTOPD_META"], out=str(tmp_path / "out"))
    write_amazon(cfg)
    splits = read_splits(cfg.out)
    assert (len(splits["train"]), len(splits["eval"])) == (4000, 512)
    for example in splits["train"] + splits["eval"]:
        assert len(example.query) + sum(len(item.text) for item in example.items) < 600
