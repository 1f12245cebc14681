import itertools

import pytest
from fakes import FakeLearner, FakeWorkers

from listopd_ray.evaluate import InChunks
from listopd_ray.label import label_examples, relevance_of
from listopd_ray.models import encode_prompt
from listopd_ray.splits import Split
from listopd_ray.task.contract import TokenText, ideal_ranking
from listopd_ray.types import Prompt


@pytest.fixture
def split(examples, tokenizer):
    prompts = [
        Prompt(id=e.id, token_ids=encode_prompt(tokenizer, e, chat_template=False), num_items=3)
        for e in examples
    ]
    return Split(examples=examples, prompts=prompts)


def test_the_relevance_of_a_ranking_falls_in_equal_steps_from_one_to_one_kth():
    assert relevance_of((3, 1, 4, 2)) == (0.75, 0.25, 1.0, 0.5)
    assert relevance_of((1, 2)) == (1.0, 0.5)


def test_the_ideal_ranking_of_the_labels_is_the_models_ranking():
    for ranking in itertools.permutations(range(1, 6)):
        assert ideal_ranking(relevance_of(ranking)) == ranking


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_labels_are_the_greedy_rankings_and_broken_outputs_are_counted(
    split, tokenizer, chunk_size
):
    events = []
    workers = FakeWorkers(events, tokenizer)
    workers.load_weights(FakeLearner(events).publish_weights())
    del events[:]
    text = TokenText(tokenizer, [tokenizer.eos_token_id])
    labelled, dropped = label_examples(workers, split, text, chunk_size)
    assert len(events) == -(-len(split.prompts) // chunk_size)

    meaning = {
        '{"ranking": [1, 2, 3]}': (1.0, 2 / 3, 1 / 3),
        '{"ranking": [3, 1, 2]}': (2 / 3, 1 / 3, 1.0),
        '{"ranking": [2, 2, 1]}': "not_a_permutation",
        "no": "not_json",
    }
    expected, broken = {}, []
    for example, prompt in zip(split.examples, split.prompts, strict=True):
        ((reference,),) = [workers.generate([prompt], "label", greedy=True)]
        (rollout,) = reference.value.rollouts
        means = meaning[tokenizer.decode(rollout.token_ids[:-1])]
        if isinstance(means, str):
            broken.append(means)
        else:
            expected[example.id] = means
    assert len(expected) > 5 and len(set(broken)) == 2, "every case must occur"
    assert {e.id: e.relevance for e in labelled} == expected
    assert dropped == {reason: broken.count(reason) for reason in sorted(set(broken))}
    originals = {e.id: e for e in split.examples}
    for example in labelled:
        assert (example.query, example.items) == (
            originals[example.id].query,
            originals[example.id].items,
        )
    assert [e.id for e in labelled] == [e.id for e in split.examples if e.id in expected]


def test_a_bar_counts_outputs_chunk_by_chunk_and_chunks_change_no_output(split, tokenizer):
    events = []
    workers = FakeWorkers(events, tokenizer)
    workers.load_weights(FakeLearner(events).publish_weights())
    seen = []

    class Bar:
        update = staticmethod(seen.append)

    def tokens(sampler, prompts):
        parts = sampler.fetch(sampler.generate(prompts, "x", group_size=2))
        return [(r.prompt.id, r.token_ids.tolist()) for part in parts for r in part.rollouts]

    prompts = split.prompts[:7]
    assert tokens(InChunks(workers, 3, Bar()), prompts) == tokens(workers, prompts)
    assert seen == [6, 6, 2]
