"""Ranking examples from files in the format of Amazon Reviews 2023 (.jsonl or .jsonl.gz).

From metadata alone, relevance follows a rubric over real fields. An anchor product makes the
shopper: its department, a budget from 1 to 2 times its price, sometimes its store. The list is
the anchor and random other products; for each one

    4 × department   1 as asked · ½ unknown or related (unisex, kids) · 0 another
    3 × budget       1 within · ½ price unknown · 0 above
    2 × store        1 as asked · 0 another
    2 × rating       average shrunk to the catalogue's mean by 20 ratings, from 1 … 5 to 0 … 1
    1 × popularity   log(1 + ratings), relative to the most rated product

summed over what the query asks for and divided by its weights. What the rubric reads is in the
item's text, so that a model can learn it; a store is asked for only where the title shown has it.

With reviews, relevance is what a user did: the query lists up to three earlier purchases, the last
purchase has relevance 1, and products that the user never bought have 0. A review counts as a
purchase; later reviews of the same product do not count again.

Splits share no query. They do share products: an item of an eval list may occur in train.
Products and purchases are held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, isfinite, log1p
from pathlib import Path
from typing import Any

import numpy as np

from listopd_ray.task.data import (
    BadRow,
    Quarantine,
    read_rows,
    split_by_query,
    text_field,
    typed,
    write_dataset,
)
from listopd_ray.types import Example, Item, ListopdError

MAX_RATINGS = 1_000_000_000  # of a product; more is a broken row
PRIOR_RATINGS = 20  # ratings at the catalogue's mean that every product starts with
STORE_SHARE = 0.3  # of the shoppers whose anchor shows its store
BUDGET_SHARE = 0.8  # of the shoppers whose anchor has a price
MAX_TIMESTAMP = 1e15  # milliseconds; far beyond any review
HISTORY = 3  # earlier purchases in a query
DEPARTMENT_WORDS = {
    "women": {"women", "womens", "woman", "ladies"},
    "men": {"men", "mens"},  # not "man": a costume is often of one
    "baby": {"baby", "babies", "infant", "newborn"},
    "kids": {"kids", "kid", "children", "child", "toddler", "youth"},
    "girls": {"girls", "girl"},
    "boys": {"boys", "boy"},
    "unisex": {"unisex"},
}
DEPARTMENT_LABELS = {
    "women": "women's",
    "men": "men's",
    "baby": "baby",
    "kids": "kids'",
    "girls": "girls'",
    "boys": "boys'",
    "unisex": "unisex",
}
RELATED = (
    {"unisex", "women"},
    {"unisex", "men"},
    {"kids", "girls"},
    {"kids", "boys"},
)


@dataclass(frozen=True)
class AmazonConfig:
    meta: str | None = None  # product metadata
    reviews: str | None = None  # null: the rubric over metadata
    out: str = "data/amazon"
    seed: int = 0
    num_items: int = 6  # K
    num_train: int = 4000
    num_eval: int = 512
    max_title_words: int = 4
    max_bad_rows: int = 100  # over both files; more stop the command


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    asin: str
    title: str  # as shown: cut to `max_title_words`
    department: str | None  # a key of DEPARTMENT_WORDS
    price: int | None  # whole dollars, as shown
    rating: float | None  # average, 0 … 5
    num_ratings: int
    store: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shopper:
    department: str | None = None
    budget: int | None = None  # whole dollars
    store: str | None = None


def write_amazon(cfg: AmazonConfig, advance: Callable[[int], object] | None = None) -> str:
    """Write the dataset and say so in one line. Bad rows go to `<out>/quarantine.jsonl`, bytes of
    the files that were read to `advance`."""
    meta = _validated_meta(cfg)
    out = Path(cfg.out)
    with Quarantine(out / "quarantine.jsonl", cfg.max_bad_rows) as bad:
        products = read_products(meta, cfg.max_title_words, bad, advance)
        histories = {}
        if cfg.reviews:
            histories = _read_histories(Path(cfg.reviews), products, bad, advance)
    if len(products) < cfg.num_items:
        raise ListopdError(
            f"{meta}: {len(products)} usable products for lists of {cfg.num_items}{bad.where}"
        )
    if cfg.reviews:
        examples, num_skipped = _history_examples(cfg, products, histories)
        source = f"{len(examples)} purchase histories ({num_skipped} users skipped)"
        if not examples:
            raise ListopdError(
                f"{cfg.reviews}: no user with two purchases among the products of {meta}"
            )
    else:
        examples = _rubric_examples(cfg, products)
        source = f"rubric over {len(products)} products"
    # Fewer users than asked for shrink both splits alike.
    num_eval = max(1, len(examples) * cfg.num_eval // (cfg.num_train + cfg.num_eval))
    splits = split_by_query(examples, num_eval=num_eval, seed=cfg.seed)

    settings = asdict(cfg)
    del settings["out"]  # the same dataset has the same bytes wherever it lies
    settings["meta"] = meta.name
    settings["reviews"] = Path(cfg.reviews).name if cfg.reviews else None
    record = {"source": "amazon", "settings": settings, "num_bad_rows": bad.count}
    write_dataset(out, splits, record)
    return (
        f"{cfg.out}: {len(splits['train'])} train and {len(splits['eval'])} eval examples of "
        f"{cfg.num_items} items, {source}, {bad.count} bad rows{bad.where}"
    )


def read_products(
    path: Path,
    max_title_words: int,
    quarantine: Quarantine,
    advance: Callable[[int], object] | None = None,
) -> dict[str, Product]:
    """Products by `parent_asin`, in the order of the file."""
    products: dict[str, Product] = {}

    def parse(row: dict[str, Any]) -> Product:
        product = parse_product(row, max_title_words)
        if product.asin in products:
            raise BadRow(f"duplicate parent_asin {product.asin!r}")
        return product

    for product in read_rows(path, parse, quarantine, advance):
        products[product.asin] = product
    return products


def parse_product(row: dict[str, Any], max_title_words: int) -> Product:
    """Raises BadRow without a `parent_asin` and a title; the other fields may be null or absent."""
    words = _clean(text_field(row, "title")).split(" ")
    if words == [""]:
        raise BadRow("title: nothing printable")
    details = _optional(row, "details", dict) or {}
    department = details.get("Department")
    rating = _optional(row, "average_rating", int, float)
    if rating is not None and not 0 <= rating <= 5:
        raise BadRow("average_rating: not in [0, 5]")
    num_ratings = _optional(row, "rating_number", int, float) or 0
    if not 0 <= num_ratings <= MAX_RATINGS:
        raise BadRow(f"rating_number: not in [0, {MAX_RATINGS}]")
    store = _clean(_optional(row, "store", str) or "")
    return Product(
        asin=text_field(row, "parent_asin"),
        title=" ".join(words[:max_title_words]),
        department=(find_department(department) if isinstance(department, str) else None)
        or find_department(" ".join(words)),
        price=_price(_optional(row, "price", int, float, str)),
        rating=rating,
        num_ratings=int(num_ratings),
        store=store or None,
    )


def find_department(text: str) -> str | None:
    """Who a product is for, by the words of `details.Department` or else of the title.

    Grown-ups first ("for Women Girls" is women's), both sexes together make unisex or kids'.
    """
    words = set(re.findall("[a-z]+", text.lower().replace("'", "").replace("’", "")))
    found = {name for name, spellings in DEPARTMENT_WORDS.items() if words & spellings}
    if {"women", "men"} <= found:
        return "unisex"
    if {"girls", "boys"} <= found and not found & {"women", "men", "baby"}:
        return "kids"
    return next((name for name in DEPARTMENT_WORDS if name in found), None)


def rubric(shopper: Shopper, product: Product, mean_rating: float, max_ratings: int) -> float:
    """Relevance in [0, 1] (see the module's text). `mean_rating` is of the whole catalogue."""
    rating_sum = (product.rating or 0.0) * product.num_ratings + mean_rating * PRIOR_RATINGS
    num_ratings = PRIOR_RATINGS + (product.num_ratings if product.rating is not None else 0)
    popularity = log1p(product.num_ratings) / log1p(max(max_ratings, 1))
    parts = [(2, max(0.0, (rating_sum / num_ratings - 1) / 4)), (1, popularity)]
    if shopper.department is not None:
        parts.append((4, _department_match(shopper.department, product.department)))
    if shopper.budget is not None:
        affordable = 0.5 if product.price is None else float(product.price <= shopper.budget)
        parts.append((3, affordable))
    if shopper.store is not None:
        parts.append((2, float(product.store == shopper.store)))
    return round(sum(w * part for w, part in parts) / sum(w for w, _ in parts), 4)


def item_text(product: Product) -> str:
    parts = [product.title]
    if product.department is not None:
        parts.append(DEPARTMENT_LABELS[product.department])
    if product.price is not None:
        parts.append(f"${product.price}")
    if product.rating is not None:
        parts.append(f"{product.rating:.1f} ({product.num_ratings})")
    return " ".join(parts)


def query_text(shopper: Shopper) -> str:
    parts = []
    if shopper.department is not None:
        parts.append(DEPARTMENT_LABELS[shopper.department])
    if shopper.budget is not None:
        parts.append(f"under ${shopper.budget}")
    if shopper.store is not None:
        parts.append(f"by {shopper.store}")
    return ", ".join(parts) or "best rated"


def _rubric_examples(cfg: AmazonConfig, catalogue: dict[str, Product]) -> list[Example]:
    products = list(catalogue.values())
    rng = np.random.default_rng(cfg.seed)
    ratings = [product.rating for product in products if product.rating is not None]
    mean_rating = sum(ratings) / len(ratings) if ratings else 3.0  # the middle of 1 … 5
    max_ratings = max(product.num_ratings for product in products)
    examples = []
    for number in range(1, cfg.num_train + cfg.num_eval + 1):
        drawn = rng.choice(len(products), size=cfg.num_items, replace=False)
        shopper = _shopper(rng, products[drawn[0]])
        shown = [products[index] for index in rng.permutation(drawn)]
        gains = [rubric(shopper, product, mean_rating, max_ratings) for product in shown]
        examples.append(_example(number, query_text(shopper), shown, gains))
    return examples


def _shopper(rng: np.random.Generator, anchor: Product) -> Shopper:
    wants_budget, wants_store, stretch = rng.random(3).tolist()
    has_budget = anchor.price is not None and wants_budget < BUDGET_SHARE
    shows_store = anchor.store is not None and anchor.store.lower() in anchor.title.lower()
    return Shopper(
        department=anchor.department,
        budget=ceil((anchor.price or 0) * (1 + stretch)) if has_budget else None,
        store=anchor.store if shows_store and wants_store < STORE_SHARE else None,
    )


def _read_histories(
    path: Path,
    products: dict[str, Product],
    quarantine: Quarantine,
    advance: Callable[[int], object] | None,
) -> dict[str, list[str]]:
    """Known products of each user, in the order of their first purchase."""
    purchases: dict[str, list[tuple[float, str]]] = {}
    for user, time, asin in read_rows(path, _parse_review, quarantine, advance):
        purchases.setdefault(user, [])
        if asin in products:
            purchases[user].append((time, asin))
    return {
        user: list(dict.fromkeys(asin for _, asin in sorted(bought)))
        for user, bought in purchases.items()
    }


def _parse_review(row: dict[str, Any]) -> tuple[str, float, str]:
    user, asin = text_field(row, "user_id"), text_field(row, "parent_asin")
    time = typed(row, "timestamp", int, float)
    if not 0 <= time < MAX_TIMESTAMP:
        raise BadRow("timestamp: out of range")
    return user, time, asin


def _history_examples(
    cfg: AmazonConfig, products: dict[str, Product], histories: dict[str, list[str]]
) -> tuple[list[Example], int]:
    """An example for each of enough users, and how many users could not give one."""
    rng = np.random.default_rng(cfg.seed)
    users = sorted(
        user
        for user, bought in histories.items()
        if len(bought) >= 2 and len(products) - len(bought) >= cfg.num_items - 1
    )
    chosen = [users[index] for index in rng.permutation(len(users))]
    chosen = chosen[: cfg.num_train + cfg.num_eval]
    asins = list(products)
    examples = []
    for number, user in enumerate(chosen, start=1):
        *earlier, last = histories[user]
        negatives = _never_bought(rng, asins, set(histories[user]), cfg.num_items - 1)
        candidates = [last, *negatives]
        shown = [products[candidates[index]] for index in rng.permutation(cfg.num_items)]
        gains = [float(product.asin == last) for product in shown]
        query = "; ".join(products[asin].title for asin in earlier[-HISTORY:])
        examples.append(_example(number, query, shown, gains))
    return examples, len(histories) - len(users)


def _never_bought(
    rng: np.random.Generator, asins: list[str], bought: set[str], n: int
) -> list[str]:
    """`n` random products: enough are drawn that `n` remain without what was bought."""
    drawn = rng.choice(len(asins), size=min(len(asins), n + len(bought)), replace=False)
    return [asins[index] for index in drawn if asins[index] not in bought][:n]


def _example(number: int, query: str, shown: list[Product], gains: list[float]) -> Example:
    return Example(
        id=f"amz-{number:06d}",
        query=query,
        items=tuple(Item(id=product.asin, text=item_text(product)) for product in shown),
        relevance=tuple(gains),
    )


def _department_match(asked: str, department: str | None) -> float:
    if asked == department:
        return 1.0
    return 0.5 if department is None or {asked, department} in RELATED else 0.0


def _optional(row: dict[str, Any], key: str, *kinds: type) -> Any:
    return typed(row, key, *kinds) if row.get(key) is not None else None


def _price(value: float | str | None) -> int | None:
    """Whole dollars, at least 1; None where unknown: null, zero, or words such as "from 9.99"."""
    try:
        price = float(value.removeprefix("$") if isinstance(value, str) else value or 0)
    except (ValueError, OverflowError):
        return None
    return max(1, round(price)) if isfinite(price) and price > 0 else None


def _clean(text: str) -> str:
    """Control characters and every kind of white space become single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _validated_meta(cfg: AmazonConfig) -> Path:
    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise ListopdError(f"data amazon: {rule}")

    require(cfg.num_items >= 2, "num_items must be ≥ 2")
    require(cfg.num_train >= 1, "num_train must be ≥ 1")
    require(cfg.num_eval >= 1, "num_eval must be ≥ 1")
    require(cfg.max_title_words >= 1, "max_title_words must be ≥ 1")
    require(cfg.seed >= 0, "seed must be ≥ 0")
    if not cfg.meta:
        raise ListopdError(
            "data amazon: give meta=FILE, product metadata of Amazon Reviews 2023 (.jsonl[.gz])"
        )
    return Path(cfg.meta)
