import numpy as np
import pytest
import torch

from listopd_ray.roles.hf_engine import _draw, generate
from listopd_ray.roles.rollout import Request
from listopd_ray.types import Prompt

SEEDS = range(1, 7)


@pytest.fixture(scope="module")
def requests(rollouts):
    """Prompts of several lengths, each with a seed of its own."""
    return [
        Request(prompt=rollout.prompt, sample_index=0, seed=seed)
        for rollout, seed in zip(rollouts, SEEDS, strict=False)
    ]


@pytest.fixture(scope="module")
def sample(student_model):
    def draw(requests, max_new_tokens=12):
        return generate(
            student_model,
            requests,
            greedy=False,
            end_ids=(0,),
            max_new_tokens=max_new_tokens,
        )

    return draw


def test_a_sample_is_the_same_alone_and_among_others(sample, requests):
    together = sample(requests)
    assert len({tuple(completion.token_ids) for completion in together}) == len(requests)
    for request, completion in zip(requests, together, strict=True):
        (alone,) = sample([request])
        assert alone.token_ids == completion.token_ids


def test_another_seed_is_another_sample(sample, requests):
    prompt = requests[0].prompt
    drawn = [Request(prompt=prompt, sample_index=seed, seed=seed) for seed in SEEDS]
    assert len({tuple(completion.token_ids) for completion in sample(drawn)}) == len(drawn)


def test_a_prompt_of_one_token_completes(sample):
    prompt = Prompt(id="one", token_ids=np.array([5], dtype=np.int32), num_items=3)
    (completion,) = sample([Request(prompt=prompt, sample_index=0, seed=1)], max_new_tokens=1)
    assert len(completion.token_ids) == 1


def test_evenly_spaced_noise_draws_every_token_as_often_as_it_is_likely():
    probabilities = torch.tensor([0.0, 0.125, 0.5, 0.0, 0.25, 0.125, 0.0])
    noise = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    drawn = _draw(probabilities.log().expand(8, -1), noise)
    assert torch.bincount(drawn, minlength=7).tolist() == [0, 1, 4, 0, 2, 1, 0]
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)  # the smallest and largest noise
    assert _draw(probabilities.log().expand(2, -1), ends).tolist() == [1, 5]


def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_is_likely():
    """151,936 tokens of which all but one share 1e-6: a float32 sum is too coarse for them."""
    size = 151_936
    logprobs = torch.full((5, size), np.log(1e-6 / (size - 1)))
    logprobs[:, 0] = np.log(1 - 1e-6)
    quantiles = torch.tensor([0.25, 0.4, 0.5, 0.6, 0.75], dtype=torch.float64)
    drawn = _draw(logprobs, 1 - 1e-6 + 1e-6 * quantiles)
    assert ((drawn / size - quantiles).abs() < 1e-3).all()
