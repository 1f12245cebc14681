import json
from itertools import combinations
from time import perf_counter

import pytest

from listopd_ray.task.data import dataset_hash, read_examples
from listopd_ray.task.synthetic import (
    CATEGORIES,
    CRITERIA,
    SyntheticConfig,
    make_examples,
    write_synthetic,
)
from listopd_ray.types import ListopdError

SUBSETS = [list(chosen) for n in (1, 2, 3) for chosen in combinations(CRITERIA, n)]
SMALL = {"num_train": 300, "num_eval": 60}


def everything(**settings):
    splits = make_examples(SyntheticConfig(**{**SMALL, **settings}))
    return splits["train"] + splits["eval"]


def test_relevance_under_all_criteria_is_the_stated_formula_of_the_texts():
    for example in everything():
        wanted, budget = example.query.split(" $")
        for item, gain in zip(example.items, example.relevance, strict=True):
            category, price, rating = item.text.replace("$", "").split()
            match, affordable = category == wanted, int(price) <= int(budget)
            assert gain == pytest.approx(0.5 * match + 0.25 * affordable + 0.25 * int(rating) / 9)


def test_the_order_by_relevance_is_lexicographic_and_strict():
    for example in everything():
        wanted, budget = example.query.split(" $")

        def merit(item, wanted=wanted, budget=budget):
            category, price, rating = item.text.replace("$", "").split()
            return (category == wanted, int(price) <= int(budget), int(rating))

        by_gain = sorted(
            zip(example.relevance, example.items, strict=True), key=lambda pair: pair[0]
        )
        assert [item for _, item in by_gain] == sorted(example.items, key=merit)
        assert len(set(example.relevance)) == len(example.items)


def test_without_a_budget_texts_hide_the_price_and_the_rating_weighs_half():
    for example in everything(criteria=["category", "rating"]):
        assert example.query in CATEGORIES
        for item, gain in zip(example.items, example.relevance, strict=True):
            category, rating = item.text.split()
            assert gain == pytest.approx(0.5 * (category == example.query) + 0.5 * int(rating) / 9)


def test_with_ratings_alone_the_category_is_shown_but_does_not_count():
    for example in everything(criteria=["rating"]):
        assert example.query == "best rated"
        for item, gain in zip(example.items, example.relevance, strict=True):
            category, rating = item.text.split()
            assert category in CATEGORIES and gain == pytest.approx(int(rating) / 9)


@pytest.mark.parametrize("num_items", [2, 9])
@pytest.mark.parametrize("criteria", SUBSETS, ids="-".join)
def test_every_subset_gives_lists_of_distinct_products_with_gains_up_to_one(criteria, num_items):
    for example in everything(criteria=criteria, num_items=num_items):
        assert len({item.id for item in example.items}) == len(example.items) == num_items
        assert all(0 <= gain <= 1 for gain in example.relevance)
        assert any("$" in item.text for item in example.items) == ("budget" in criteria)


@pytest.mark.parametrize("criteria", SUBSETS, ids="-".join)
def test_no_list_of_eval_occurs_in_train_before_the_same_shopper(criteria):
    def contents(split):
        return {
            (example.query, tuple(sorted(item.text for item in example.items))) for example in split
        }

    # Lists of two repeat often, so that a split by row would share many.
    cfg = SyntheticConfig(criteria=criteria, num_items=2, num_train=1500, num_eval=100)
    splits = make_examples(cfg)
    assert len(splits["train"]) + len(splits["eval"]) == 1600
    assert 80 <= len(splits["eval"]) <= 100
    assert not contents(splits["train"]) & contents(splits["eval"])


def test_the_share_of_matching_items_is_the_configured_one():
    gains = [gain for example in everything(num_train=3000) for gain in example.relevance]
    share = sum(gain > 0.5 for gain in gains) / len(gains)
    assert share == pytest.approx(0.45, abs=0.02)  # 18 360 items: standard error 0.004


def test_prices_ratings_budgets_and_categories_cover_their_ranges():
    examples = everything(num_train=3000)
    fields = [item.text.replace("$", "").split() for example in examples for item in example.items]
    digits = {str(digit) for digit in range(1, 10)}
    assert {field[0] for field in fields} == set(CATEGORIES)
    assert {field[1] for field in fields} == digits == {field[2] for field in fields}
    assert {example.query[-1] for example in examples} == digits - {"1", "9"}


def test_a_product_has_one_text_over_the_whole_set():
    texts = {}
    for example in everything():
        for item in example.items:
            assert texts.setdefault(item.id, item.text) == item.text
    assert len(set(texts.values())) == len(texts) > 600


def test_a_written_set_repeats_for_its_seed_and_passes_the_reader(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = SyntheticConfig(out=str(tmp_path / name), seed=seed, **SMALL)
        assert "300 train and 60 eval" in write_synthetic(cfg)
    assert dataset_hash(tmp_path / "a") == dataset_hash(tmp_path / "b")
    assert dataset_hash(tmp_path / "a") != dataset_hash(tmp_path / "c")
    records = [(tmp_path / name / "dataset.json").read_bytes() for name in "ab"]
    assert records[0] == records[1]
    assert json.loads(records[0])["settings"]["seed"] == 0
    train = read_examples(tmp_path / "a" / "train.jsonl", max_bad_rows=0)
    assert train == make_examples(SyntheticConfig(**SMALL))["train"]


def test_another_seed_draws_other_lists():
    assert {one.items for one in everything()} != {one.items for one in everything(seed=1)}


def test_the_default_set_is_made_in_seconds():
    start = perf_counter()
    splits = make_examples(SyntheticConfig())
    assert perf_counter() - start < 10  # about 0.2 s on an idle core
    assert (len(splits["train"]), len(splits["eval"])) == (20_000, 1024)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("criteria", {"criteria": []}),
        ("criteria", {"criteria": ["colour"]}),
        ("criteria", {"criteria": ["rating", "rating"]}),
        ("num_items", {"num_items": 10}),
        ("num_items", {"num_items": 1}),
        ("num_items", {"num_items": 82, "criteria": ["category"]}),
        ("match_share", {"match_share": 1.5}),
        ("num_train", {"num_train": 0}),
        ("num_eval", {"num_eval": 0}),
        ("seed", {"seed": -1}),
    ],
)
def test_a_setting_out_of_range_is_named(key, settings):
    with pytest.raises(ListopdError, match=key):
        make_examples(SyntheticConfig(**settings))


def test_lists_may_be_longer_where_ratings_do_not_count():
    for example in everything(criteria=["category", "budget"], num_items=30, match_share=1.0):
        assert len({item.id for item in example.items}) == 30
