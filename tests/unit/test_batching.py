from copy import deepcopy

import numpy as np
import pytest
import torch
from fakes import make_rollout
from hypothesis import given
from hypothesis import strategies as st
from oracles import prefix_logprobs
from transformers import MambaConfig, MambaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from listopd_ray.roles.batching import (
    can_share_prompts,
    collate,
    collate_rollouts,
    completion_logprobs,
    gather,
    micro_batches,
    sequence_lengths,
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


@pytest.fixture
def groups(rollouts):
    """Samples of two prompts, interleaved, and of a third that has one alone."""
    first, second, third = (rollout.prompt for rollout in rollouts[:3])
    prompts = [first, second, third, first, second, first]
    completions = [rollouts[i % len(rollouts)].token_ids for i in (0, 1, 2, 3, 4, 5)]
    return [
        make_rollout(prompt.token_ids, token_ids[: 3 + 2 * i] if i % 2 else token_ids)
        for i, (prompt, token_ids) in enumerate(zip(prompts, completions, strict=True))
    ]


def test_samples_of_one_prompt_do_not_see_each_other(student_model, groups):
    batch = collate_rollouts(groups, share_prompts=True)
    assert len(batch.input_ids) == 3
    assert batch.token_ids.tolist() == collate_rollouts(groups).token_ids.tolist()
    with torch.inference_mode():
        together = completion_logprobs(student_model, batch).numpy()
    expected = [
        prefix_logprobs(student_model, rollout.prompt.token_ids, rollout.token_ids)
        for rollout in groups
    ]
    assert np.abs(together - np.concatenate(expected)).max() < TOLERANCE


def test_a_shared_prompt_is_fed_once_and_no_last_token():
    first, second = [1, 2, 3], [4]
    rollouts = [
        make_rollout(first, [5, 6]),
        make_rollout(second, [9]),
        make_rollout(first, [7, 8, 9]),
    ]
    batch = collate_rollouts(rollouts, share_prompts=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 7, 8], [4, 0, 0, 0, 0, 0]]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.token_ids.tolist() == [5, 6, 9, 7, 8, 9]
    assert batch.rows.tolist() == [0, 0, 1, 0, 0, 0]
    assert batch.columns.tolist() == [2, 3, 0, 2, 4, 5]


def test_a_batch_without_groups_is_an_ordinary_one(rollouts):
    batch = collate_rollouts(rollouts[:2], share_prompts=True)
    assert batch.attention_mask is None and batch.position_ids is None


def test_samples_of_one_prompt_stay_in_one_micro_batch():
    rollouts = [
        make_rollout([7, prompt], [5] * n) for prompt, n in ((1, 9), (1, 2), (2, 5), (2, 4))
    ]
    lengths = sequence_lengths(rollouts, share_prompts=True)
    assert lengths == [11, 11, 7, 7]
    assert list(micro_batches(lengths, 2)) == [[0, 1], [2, 3]]


def test_only_models_that_attend_to_everything_share_prompts(student_model):
    assert can_share_prompts(student_model)
    windowed = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=64,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=0,
        )
    )
    assert not can_share_prompts(windowed)
    assert not can_share_prompts(
        MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    )
    eager = deepcopy(student_model)
    eager.set_attn_implementation("eager")
    assert not can_share_prompts(eager)
