"""A synthetic ranking task: shoppers before a seeded fashion catalogue, with known relevance.

A shopper wants a category, has a budget and prefers a higher rating; `criteria` says which of
these count. Relevance is lexicographic in that order: a matching item beats any other, among
equals an affordable one does, and then the rating decides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from listopd_ray.task.data import split_by_query, write_dataset
from listopd_ray.types import Example, Item, ListopdError

CATEGORIES = ("socks", "belt", "dress", "shirt", "boots", "scarf", "jacket", "hat")
CRITERIA = ("category", "budget", "rating")  # most important first
TIERS = 9  # prices and ratings are digits 1 … 9


@dataclass(frozen=True)
class SyntheticConfig:
    out: str = "data/synthetic"
    seed: int = 0
    num_items: int = 6  # K; at most 9 with the criterion rating, whose values do not repeat
    num_train: int = 20_000
    num_eval: int = 1024
    criteria: list[str] = field(default_factory=lambda: list(CRITERIA))
    match_share: float = 0.45  # probability that an item is of the wanted category


def write_synthetic(cfg: SyntheticConfig) -> str:
    """Write the dataset and say so in one line."""
    splits = make_examples(cfg)
    settings = asdict(cfg)
    del settings["out"]  # the same dataset has the same bytes wherever it lies
    write_dataset(Path(cfg.out), splits, {"source": "synthetic", "settings": settings})
    return (
        f"{cfg.out}: {len(splits['train'])} train and {len(splits['eval'])} eval examples of "
        f"{cfg.num_items} items, criteria {', '.join(_ordered(cfg.criteria))}"
    )


def make_examples(cfg: SyntheticConfig) -> dict[str, list[Example]]:
    """Train and eval examples, a pure function of the settings.

    A query string names only the shopper, of whom there are few. What must not be shared by the
    splits is a shopper before a list: the same items in another order count as the same list.
    """
    _validate(cfg)
    rng = np.random.default_rng(cfg.seed)
    n, k = cfg.num_train + cfg.num_eval, cfg.num_items
    wanted = rng.integers(len(CATEGORIES), size=n)
    budget = rng.integers(2, TIERS, size=n)  # 2 … 8: never all items affordable by design
    another = (wanted[:, None] + rng.integers(1, len(CATEGORIES), size=(n, k))) % len(CATEGORIES)
    category = np.where(rng.random((n, k)) < cfg.match_share, wanted[:, None], another)
    if "rating" in cfg.criteria:  # distinct ratings: no ties, and no product twice
        rating = _draw_distinct(rng, n, TIERS, k)
        price = rng.integers(TIERS, size=(n, k))
    else:
        price, rating = np.divmod(_draw_distinct(rng, n, TIERS * TIERS, k), TIERS)
    products = (category * TIERS + price) * TIERS + rating
    gains = _relevance(
        cfg.criteria,
        match=category == wanted[:, None],
        affordable=price + 1 <= budget[:, None],
        rating=rating + 1,
    )

    catalogue = _catalogue(cfg.criteria)
    examples = [
        Example(
            id=f"syn-{number:06d}",
            query=_query(cfg.criteria, CATEGORIES[wanted_row], budget_row),
            items=tuple(catalogue[product] for product in product_row),
            relevance=tuple(gain_row),
        )
        for number, (wanted_row, budget_row, product_row, gain_row) in enumerate(
            zip(wanted.tolist(), budget.tolist(), products.tolist(), gains.tolist(), strict=True),
            start=1,
        )
    ]
    return split_by_query(examples, num_eval=cfg.num_eval, seed=cfg.seed, key=_shopper_and_list)


def _relevance(
    criteria: list[str], match: np.ndarray, affordable: np.ndarray, rating: np.ndarray
) -> np.ndarray:
    """Gains in [0, 1]: each criterion weighs half of what is left, the rating all of it.

    A rating is at least 1, so that an item which is better in an earlier criterion stays ahead of
    one with the highest rating.
    """
    gains, left = np.zeros(rating.shape), 1.0
    for name, holds in (("category", match), ("budget", affordable)):
        if name in criteria:
            left /= 2
            gains += left * holds
    return gains + left * rating / TIERS if "rating" in criteria else gains


def _catalogue(criteria: list[str]) -> list[Item]:
    """Every category at every price and rating. The text always names the category."""
    texts = [
        category
        + (f" ${price}" if "budget" in criteria else "")
        + (f" {rating}" if "rating" in criteria else "")
        for category in CATEGORIES
        for price in range(1, TIERS + 1)
        for rating in range(1, TIERS + 1)
    ]
    return [Item(id=f"p{number:04d}", text=text) for number, text in enumerate(texts)]


def _query(criteria: list[str], category: str, budget: int) -> str:
    parts = [category] * ("category" in criteria) + [f"${budget}"] * ("budget" in criteria)
    return " ".join(parts) or "best rated"


def _draw_distinct(rng: np.random.Generator, n: int, high: int, k: int) -> np.ndarray:
    """[n, k] integers below `high`, without repetition in a row."""
    return rng.permuted(np.tile(np.arange(high), (n, 1)), axis=1)[:, :k]


def _shopper_and_list(example: Example) -> str:
    return "\n".join([example.query, *sorted(item.text for item in example.items)])


def _ordered(criteria: list[str]) -> list[str]:
    return [name for name in CRITERIA if name in criteria]


def _validate(cfg: SyntheticConfig) -> None:
    def require(holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ListopdError(f"data synthetic: {key} {rule}")

    criteria = set(cfg.criteria)
    known = f"must be some of {', '.join(CRITERIA)}, each once"
    require(bool(criteria) and criteria <= set(CRITERIA), "criteria", known)
    require(len(criteria) == len(cfg.criteria), "criteria", known)
    most = TIERS if "rating" in criteria else TIERS * TIERS
    require(2 <= cfg.num_items <= most, "num_items", f"must lie in [2, {most}] with these criteria")
    require(cfg.num_train >= 1, "num_train", "must be ≥ 1")
    require(cfg.num_eval >= 1, "num_eval", "must be ≥ 1")
    require(0 <= cfg.match_share <= 1, "match_share", "must lie in [0, 1]")
    require(cfg.seed >= 0, "seed", "must be ≥ 0")
