import numpy as np
import pytest
import torch
from fakes import make_rollout
from hypothesis import given
from hypothesis import strategies as st
from oracles import prefix_logprobs

from listopd_ray.roles.batching import (
    collate,
    collate_rollouts,
    completion_logprobs,
    gather,
    micro_batches,
)

# Float32 forward passes over another batch shape: sums in another order, through two layers.
TOLERANCE = 1e-5


def logprobs_of(model, rollouts):
    with torch.inference_mode():
        return completion_logprobs(model, collate_rollouts(rollouts)).numpy()


def test_logprobs_do_not_depend_on_the_padding(student_model, rollouts):
    together = logprobs_of(student_model, rollouts)
    alone = np.concatenate([logprobs_of(student_model, [rollout]) for rollout in rollouts])
    assert np.abs(together - alone).max() < TOLERANCE


def test_entry_t_describes_token_t_given_all_tokens_before_it(student_model, rollouts):
    together = logprobs_of(student_model, rollouts)
    expected = [
        prefix_logprobs(student_model, rollout.prompt.token_ids, rollout.token_ids)
        for rollout in rollouts
    ]
    assert np.abs(together - np.concatenate(expected)).max() < TOLERANCE


def test_gather_takes_the_sampled_token(student_model, rollouts):
    batch = collate_rollouts(rollouts)
    with torch.inference_mode():
        sampled = gather(completion_logprobs(student_model, batch), batch.token_ids).numpy()
    # The fixture's own numbers come from the oracle.
    expected = np.concatenate([rollout.sampler_logprobs for rollout in rollouts])
    assert np.abs(sampled - expected).max() < TOLERANCE


def test_the_end_of_sequence_is_a_token_like_any_other(tokenizer):
    end = tokenizer.eos_token_id
    assert end == 0, "the case where the end token's id is the padding's value"
    batch = collate_rollouts([make_rollout([7, 8, 9], [end]), make_rollout([7], [5, end, 6, end])])
    assert batch.token_ids.tolist() == [end, 5, end, 6, end]
    assert batch.num_tokens == 5


def test_collate_places_each_token_behind_its_prefix():
    batch = collate([np.array([1, 2, 3]), np.array([4])], [np.array([5, 6]), np.array([7])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6], [4, 7, 0, 0, 0]]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.columns.tolist() == [2, 3, 0]
    assert batch.token_ids.tolist() == [5, 6, 7]


def test_collate_refuses_prompts_without_their_completions():
    with pytest.raises(ValueError, match="zip"):
        collate([np.array([1])], [np.array([2]), np.array([3])])


@given(lengths=st.lists(st.integers(1, 50), max_size=40), size=st.integers(1, 9))
def test_micro_batches_hold_every_index_once_longest_first(lengths, size):
    groups = list(micro_batches(lengths, size))
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(1 <= len(group) <= size for group in groups)
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert len(groups) == -(-len(lengths) // size)
