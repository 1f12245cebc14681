"""The listwise JSON contract: prompt, answer, strict parse, and the class of every answer token.

K items are numbered 1…K in the prompt; the answer is exactly `{"ranking": [3, 1, 2]}`, best first,
and then the end of sequence. JSON whitespace may stand wherever JSON allows it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from listopd_ray.types import Example, FinishReason, Judged, TokenClass

Reason = Literal["truncated", "not_json", "extra_text", "wrong_schema", "not_a_permutation"]
REASONS: tuple[Reason, ...] = get_args(Reason)  # the first that applies is the one reported

WHITESPACE = " \t\n\r"  # JSON's own
DIGITS = "0123456789"
OPENING = '{"ranking":['
KEY_INSIDE = range(OPENING.index('"') + 1, OPENING.rindex('"') + 1)  # no free whitespace here
CLOSING = "]}"


# Prompt and answer


def prompt_text(example: Example) -> str:
    """The prompt of models made here: the query, then one numbered line per item."""
    return f"{_one_line(example.query)}\n{_numbered_items(example)}\n"


def chat_messages(example: Example) -> list[dict[str, str]]:
    """The prompt of checkpoints with a chat template."""
    num_items = len(example.items)
    content = (
        f"Rank these {num_items} items by how well they suit what the shopper searched for.\n\n"
        f"Search: {_one_line(example.query)}\n\n"
        f"Items:\n{_numbered_items(example)}\n\n"
        'Answer only with JSON of exactly this form: {"ranking": [id, id, ...]}\n'
        f"List all {num_items} item numbers, each once, best first."
    )
    return [{"role": "user", "content": content}]


def answer_text(ranking: Iterable[int]) -> str:
    return json.dumps({"ranking": [int(item) for item in ranking]})


def ideal_ranking(relevance: Sequence[float]) -> tuple[int, ...]:
    """Items 1…K by descending relevance; ties keep the order of the list."""
    return tuple(sorted(range(1, len(relevance) + 1), key=lambda item: -relevance[item - 1]))


def _numbered_items(example: Example) -> str:
    lines = (f"{number} {_one_line(item.text)}" for number, item in enumerate(example.items, 1))
    return "\n".join(lines)


def _one_line(text: str) -> str:
    # A line break inside a text could pass for another item.
    return " ".join(text.split())


# Strict parse


def judge(example_id: str, text: str, num_items: int, finish_reason: FinishReason) -> Judged:
    ranking, reason = strict_parse(text, num_items, finish_reason)
    return Judged(example_id=example_id, text=text, ranking=ranking, reason=reason)


def strict_parse(
    text: str, num_items: int, finish_reason: FinishReason
) -> tuple[tuple[int, ...] | None, Reason | None]:
    """(ranking, None) where the whole completion keeps the contract, else (None, reason).

    `text` is the completion without its end of sequence. `extra_text`: not JSON as a whole, but
    an object can be read from the first brace on; `not_json`: not even that.
    """
    if finish_reason == "length":
        return None, "truncated"
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None, "extra_text" if _holds_object(text) else "not_json"
    if not isinstance(value, tuple) or len(value) != 1 or value[0][0] != "ranking":
        return None, "wrong_schema"
    ranking = value[0][1]
    # `type` and not `isinstance`: true is an int to Python.
    if not isinstance(ranking, list) or any(type(item) is not int for item in ranking):
        return None, "wrong_schema"
    if sorted(ranking) != list(range(1, num_items + 1)):
        return None, "not_a_permutation"
    return tuple(ranking), None


def _holds_object(text: str) -> bool:
    try:
        _DECODER.raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Objects become tuples of pairs, so that a key given twice is seen and no array passes for one.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=_refuse_constant)


def first_violation(text: str, num_items: int) -> int | None:
    """Index of the first character that breaks the contract: `len(text)` where it ends too early,
    None where the whole completion keeps it."""
    place = _Place(num_items=num_items, unused=frozenset(range(1, num_items + 1)))
    for index, char in enumerate(text):
        _, following = _read_char(place, char)
        if following is None:
            return index
        place = following
    return None if place.closed == len(CLOSING) else len(text)


# Token classes


class TokenText:
    """The text that each token id adds to a completion, special tokens spelled out.

    Ids are decoded one by one and remembered. A character that spans several tokens shows as
    U+FFFD in each: the contract holds no such character, so its tokens are stray all the same.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)
        # Some decoders drop the space at the start of a text: every id is decoded behind this one.
        self._anchor = tokenizer.encode("{", add_special_tokens=False)[-1]
        self._anchor_length = len(self._decode([self._anchor]))
        self._texts: dict[int, str] = {}

    def pieces(self, token_ids: Sequence[int] | np.ndarray) -> list[str]:
        ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else map(int, token_ids)
        return [self._texts.get(token_id) or self._piece(token_id) for token_id in ids]

    def ended(self, token_ids: Sequence[int] | np.ndarray) -> bool:
        """Whether the completion ends with the end of sequence."""
        return len(token_ids) > 0 and int(token_ids[-1]) in self._eos_ids

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The whole completion without its end of sequence, for `strict_parse`."""
        ids = [int(token_id) for token_id in token_ids]
        return self._decode(ids[:-1] if self.ended(ids) else ids)

    def _piece(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._decode([self._anchor, token_id])[self._anchor_length :]
            self._texts[token_id] = text
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class IdTokens:
    """Which tokens of a vocabulary can begin an item id, for lists of K items."""

    def __init__(self, tokenizer: Any, num_items: int) -> None:
        token_text = TokenText(tokenizer, eos_ids=())
        starts: list[tuple[int, list[bool]]] = []  # token id, whether it begins id 1…K
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
            if not any(char in DIGITS for char in token):
                continue  # spares decoding the whole vocabulary
            digits = token_text.pieces([token_id])[0].lstrip(WHITESPACE)
            if digits and all(char in DIGITS for char in digits):
                begins = [str(item).startswith(digits) for item in range(1, num_items + 1)]
                starts.append((token_id, begins))
        self._token_ids = np.array([token_id for token_id, _ in starts], dtype=np.int32)
        self._begins = np.array([begins for _, begins in starts]).reshape(-1, num_items)  # [·, K]
        # Bounded: K items have 2^K sets of unused ids.
        self._cached = functools.lru_cache(maxsize=4096)(self._find_first_tokens)

    def first_tokens(self, unused: frozenset[int]) -> np.ndarray:
        """Ids, ascending, of the tokens that are nothing but the start of an unused item id.

        Leading whitespace is allowed: `3` and ` 3` both count. A token that goes on after the id,
        as `3,` does, is left out.
        """
        return self._cached(unused)

    def _find_first_tokens(self, unused: frozenset[int]) -> np.ndarray:
        columns = [item - 1 for item in sorted(unused)]
        return self._token_ids[self._begins[:, columns].any(axis=1)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scan:
    """The contract's view of one completion."""

    classes: np.ndarray  # [T] int8, `TokenClass`
    unused: list[frozenset[int] | None]  # [T] ids not used yet, at the first token of an id


def scan(pieces: Sequence[str], num_items: int, ended: bool) -> Scan:
    """Label every completion token; `ended`: the last piece is the end of sequence.

    Works on the text of the tokens, so for any tokenizer. While the contract is kept a token has
    the class of its first character that is not whitespace (`, 3` is a separator, `3,` an id); a
    blank one gets the class of the place where it stands. The token that breaks the contract gets
    the class of what was due at its place – an id that is repeated or out of range is so an id –
    and every token after it is stray: no answer that keeps the contract begins that way.

    An id that starts inside a token of another class has no first token.
    """
    item_id = TokenClass.ITEM_ID  # an enum's attributes are slow
    classes: list[TokenClass] = []
    unused: list[frozenset[int] | None] = [None] * len(pieces)
    place = _start(num_items)
    for position, piece in enumerate(pieces):
        if ended and position == len(pieces) - 1:
            token_class, keeps, following = place.due(), False, place  # nothing may follow
        else:
            token_class, keeps, following = _read(place, piece)
        classes.append(token_class)
        if place.expects_id and token_class == item_id:
            unused[position] = place.unused
        if not keeps:
            break
        place = following
    classes += [TokenClass.STRAY] * (len(pieces) - len(classes))
    return Scan(classes=np.array(classes, dtype=np.int8), unused=unused)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """How far into the contract text a completion has come."""

    num_items: int
    unused: frozenset[int]  # ids
    num_ids: int = 0  # begun
    expects_id: bool = False
    digits: str = ""  # of the id being read
    opened: int = 0  # characters of OPENING read
    closed: int = 0  # characters of CLOSING read

    def due(self) -> TokenClass:
        """The class of what the contract asks for next."""
        if self.opened < len(OPENING):
            return TokenClass.OPENING
        if self.expects_id or (self.digits and not self.id_is_unused()):
            return TokenClass.ITEM_ID
        return self.blank_class()

    def id_is_unused(self) -> bool:
        return any(str(item) == self.digits for item in self.unused)

    def blank_class(self) -> TokenClass:
        if self.num_ids == 0:
            return TokenClass.OPENING
        return TokenClass.SEPARATOR if self.num_ids < self.num_items else TokenClass.CLOSING


@functools.lru_cache(maxsize=64)
def _start(num_items: int) -> _Place:
    return _Place(num_items=num_items, unused=frozenset(range(1, num_items + 1)))


@functools.lru_cache(maxsize=1 << 16)
def _read(place: _Place, piece: str) -> tuple[TokenClass, bool, _Place]:
    """(class of the token, whether it keeps the contract, the place after it).

    Completions pass the same few places again and again, hence the cache.
    """
    token_class, following = None, place
    for char in piece:
        char_class, after = _read_char(following, char)
        if after is None:
            return place.due(), False, place
        following = after
        if token_class is None and char not in WHITESPACE:
            token_class = char_class
    return following.blank_class() if token_class is None else token_class, True, following


def _read_char(place: _Place, char: str) -> tuple[TokenClass, _Place | None]:
    """The character's class and the place after it; None where it breaks the contract."""
    if char in WHITESPACE:
        keeps = place.opened not in KEY_INSIDE
        return place.blank_class(), _finish_id(place) if keeps else None
    if place.opened < len(OPENING):
        opened = place.opened + 1
        after = replace(place, opened=opened, expects_id=opened == len(OPENING))
        return TokenClass.OPENING, after if char == OPENING[place.opened] else None
    if char in DIGITS:
        return TokenClass.ITEM_ID, _read_digit(place, char)
    finished = None if place.expects_id else _finish_id(place)
    if finished is None:
        return place.due(), None
    if place.num_ids < place.num_items:
        return TokenClass.SEPARATOR, replace(finished, expects_id=True) if char == "," else None
    keeps = char == CLOSING[place.closed : place.closed + 1]
    return TokenClass.CLOSING, replace(finished, closed=place.closed + 1) if keeps else None


def _read_digit(place: _Place, char: str) -> _Place | None:
    if not (place.expects_id or place.digits):
        return None
    digits = place.digits + char
    if not any(str(item).startswith(digits) for item in place.unused):
        return None
    num_ids = place.num_ids + place.expects_id
    return replace(place, digits=digits, num_ids=num_ids, expects_id=False)


def _finish_id(place: _Place) -> _Place | None:
    """The id read so far, if any, is used; None where it is none of the unused."""
    if not place.digits:
        return place
    if not place.id_is_unused():
        return None
    return replace(place, digits="", unused=place.unused - {int(place.digits)})
