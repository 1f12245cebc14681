"""The maths again, slowly: loops over tokens in plain floats, one forward pass for each prefix.

Written from the notation of the theory, not from the package; imports nothing of it.
"""

import math
import re

import numpy as np
import torch


def clip_value(value, bound):
    if value > bound:
        return bound
    if value < -bound:
        return -bound
    return value


def advantage(learner, teacher, base, *, lam, clip, extrapolation="plain", delta=0.5):
    """One token's advantage; λ = 1 never looks at the base."""
    imitation = clip_value(teacher - learner, math.log(clip))
    if lam == 1:
        return imitation
    drive = (lam - 1) * (teacher - base)
    if extrapolation == "bounded":
        drive = clip_value(drive, (1 - delta) * math.log(clip))
    return drive + imitation


def loss(learner, sampler, advantages, *, ratio_clip, num_tokens):
    """The pessimistic surrogate, by cases: a gain is capped at the ratio's border, a loss is not.

    For A > 0 a ratio above 1 + ε counts as 1 + ε; for A < 0 a ratio below 1 − ε as 1 − ε.
    """
    total = 0.0
    for own, behaviour, gain in zip(learner, sampler, advantages, strict=True):
        ratio = math.exp(own - behaviour)
        if gain > 0 and ratio > 1 + ratio_clip:
            ratio = 1 + ratio_clip
        elif gain < 0 and ratio < 1 - ratio_clip:
            ratio = 1 - ratio_clip
        total -= ratio * gain
    return total / num_tokens


def prefix_logprobs(model, prompt, completion):
    """[T][V] log-probabilities: row t by a forward pass on the bare prefix of token t."""
    rows = []
    for t in range(len(completion)):
        prefix = [int(token) for token in [*prompt, *completion[:t]]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prefix])).logits[0, -1].double().numpy()
        top = logits.max()
        rows.append(logits - (top + math.log(np.exp(logits - top).sum())))
    return rows


def greedy(model, prompt, *, end_ids, max_new_tokens):
    """Append the most likely token until an end token or the limit."""
    tokens = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in end_ids):
        prefix = [int(token) for token in [*prompt, *tokens]]
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([prefix])).logits[0, -1].argmax()))
    return tokens


def id_starts(tokenizer, token_ids, num_items):
    """{position: ids used before it} of the tokens before which an id is due."""
    pieces = [tokenizer.decode([int(token)]) for token in token_ids]
    starts = {}
    for position, piece in enumerate(pieces):
        before = "".join("".join(pieces[:position]).split())
        listed = re.fullmatch(r'\{"ranking":\[((?:[0-9]+,)*)', before)
        if listed is None or not piece.strip():
            continue
        used = [int(number) for number in listed.group(1).split(",")[:-1]]
        allowed = set(range(1, num_items + 1))
        if len(set(used)) == len(used) and set(used) <= allowed and set(used) != allowed:
            starts[position] = set(used)
    return starts


def unused_mass(tokenizer, logprobs, used, num_items):
    """Σ of the probabilities of tokens that are a start of an unused id, any spaces before it."""
    unused = [str(item) for item in range(1, num_items + 1) if item not in used]
    total = 0.0
    for token_id in range(len(tokenizer)):
        text = tokenizer.decode([token_id])
        digits = re.fullmatch(r"[ \n\t\r]*([0-9]+)", text)
        if digits and any(item.startswith(digits.group(1)) for item in unused):
            total += math.exp(logprobs[token_id])
    return total
