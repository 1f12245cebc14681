import dataclasses
import json
import math
import shutil

import numpy as np
import oracles
import pytest
import torch

from listopd_ray.config import TeacherActorConfig
from listopd_ray.roles import head, scoring
from listopd_ray.roles.hf_engine import HfEngine
from listopd_ray.roles.prompt_scores import best_columns
from listopd_ray.roles.rollout import Generated, Request
from listopd_ray.roles.scoring import special_ids, split_columns
from listopd_ray.roles.teacher import Teacher
from listopd_ray.roles.vllm_engine import _table
from listopd_ray.roles.weights import torch_tensors
from listopd_ray.types import ListopdError, TokenClass, Weights

# Float32 through two layers, in a batch or alone.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def make_teacher(teacher_path):
    def make(**settings):
        return Teacher(
            TeacherActorConfig(**settings),
            teacher_path=str(teacher_path),
            dtype="float32",
            device="cpu",
        )

    return make


@pytest.fixture(scope="module")
def scored(make_teacher, base_path, rollouts):
    teacher = make_teacher(micro_batch_size=3, support_size=4)
    return teacher.score(Generated(rollouts=rollouts, seconds=0.0), str(base_path)).rollouts


@pytest.fixture(scope="module")
def expected(rollouts, teacher_model, base_model):
    """[rollout] (teacher [T, V], base [T, V]), each row by a forward pass of its own."""
    return [
        tuple(
            np.array(oracles.prefix_logprobs(model, r.prompt.token_ids, r.token_ids))
            for model in (teacher_model, base_model)
        )
        for r in rollouts
    ]


def test_scores_come_in_the_order_of_the_rollouts_whatever_the_micro_batch(scored, rollouts):
    assert [part.rollout for part in scored] == list(rollouts)  # compared by identity


def test_every_field_has_one_entry_a_token_of_the_documented_type(scored):
    types = {
        "modal_ids": np.int32,
        "token_classes": np.int8,
        "support_ids": np.int32,
    }
    for part in scored:
        for field in dataclasses.fields(part):
            if field.name != "rollout":
                array = getattr(part, field.name)
                assert array.shape[0] == len(part.rollout.token_ids)
                assert array.dtype == types.get(field.name, np.float32), field.name


def test_scores_are_those_of_the_bare_prefixes(scored, expected):
    for part, (teacher, base) in zip(scored, expected, strict=True):
        at = np.arange(len(part.rollout.token_ids)), part.rollout.token_ids
        modal = np.arange(len(part.rollout.token_ids)), teacher.argmax(axis=1)
        assert np.abs(part.teacher_logprobs - teacher[at]).max() < TOLERANCE
        assert np.abs(part.base_logprobs - base[at]).max() < TOLERANCE
        assert part.modal_ids.tolist() == teacher.argmax(axis=1).tolist()
        assert np.abs(part.teacher_modal_logprobs - teacher.max(axis=1)).max() < TOLERANCE
        assert np.abs(part.base_modal_logprobs - base[modal]).max() < TOLERANCE


def check_support(scored, expected, excluded):
    """The four most likely tokens but for `excluded`, best first, under teacher and base."""
    for part, (teacher, base) in zip(scored, expected, strict=True):
        allowed = teacher.copy()
        allowed[:, excluded] = -math.inf
        best = np.argsort(-allowed, axis=1)[:, :4]
        assert part.support_ids.tolist() == best.tolist()
        for logprobs, model in (
            (part.support_logprobs, teacher),
            (part.base_support_logprobs, base),
        ):
            found = np.take_along_axis(model, best, axis=1)
            assert np.abs(logprobs - found).max() < TOLERANCE


def test_support_is_the_most_likely_tokens_in_order(scored, expected):
    check_support(scored, expected, excluded=[1])  # the padding


def test_special_tokens_are_those_that_no_answer_holds(tokenizer):
    assert special_ids(tokenizer, (0,)).tolist() == [1]
    assert special_ids(tokenizer, (0, 1)).tolist() == []
    assert special_ids(tokenizer, (7,)).tolist() == [0, 1]


def test_special_tokens_never_enter_the_support_and_count_everywhere_else(
    make_teacher, base_path, scored, expected, rollouts
):
    teacher = make_teacher(micro_batch_size=3, support_size=4)
    modal = np.unique(np.concatenate([part.modal_ids for part in scored]))
    teacher._excluded = modal[::2].astype(np.int64)
    masked = teacher.score(Generated(rollouts=rollouts, seconds=0.0), str(base_path)).rollouts
    check_support(masked, expected, teacher._excluded)
    for part, plain in zip(masked, scored, strict=True):
        assert np.array_equal(part.modal_ids, plain.modal_ids)
        for name in ("teacher_logprobs", "teacher_modal_logprobs", "teacher_unused_mass"):
            np.testing.assert_array_equal(getattr(part, name), getattr(plain, name))


def test_a_support_larger_than_the_vocabulary_is_one_clear_line(make_teacher, tokenizer):
    with pytest.raises(ListopdError, match=r"^scoring\.support_size: .* has \d+ tokens to choose$"):
        make_teacher(support_size=len(tokenizer))


def test_the_vocabulary_is_never_held_for_more_tokens_than_fit(
    make_teacher, base_path, scored, rollouts, tokenizer, monkeypatch
):
    sizes = []

    def three_at_once(*arguments):
        for chunk, logits in head.logits_by_chunk(*arguments):
            sizes.append(logits.numel())
            yield chunk, logits

    monkeypatch.setattr(scoring, "LOGITS_MIB", 4 * 3.5 * len(tokenizer) / head.MIB)
    monkeypatch.setattr(scoring, "logits_by_chunk", three_at_once)
    teacher = make_teacher(micro_batch_size=3, support_size=4)
    chunked = teacher.score(Generated(rollouts=rollouts, seconds=0.0), str(base_path)).rollouts
    assert max(sizes) == 3 * len(tokenizer)
    for part, whole in zip(chunked, scored, strict=True):
        for field in dataclasses.fields(part):
            if field.name != "rollout":
                values = getattr(part, field.name), getattr(whole, field.name)
                np.testing.assert_allclose(*values, rtol=0, atol=1e-5)


# The vLLM backend without vLLM


def make_tables(rollouts, expected, num_best):
    """What an engine gives: own token first, then the best, for prompt and completion."""
    tables = []
    for rollout, (teacher, _) in zip(rollouts, expected, strict=True):
        best = np.argsort(-teacher, axis=1)[:, :num_best]
        ids = np.concatenate([rollout.token_ids[:, None], best], axis=1)
        logprobs = np.take_along_axis(teacher, ids, axis=1)
        prompt = np.full((len(rollout.prompt.token_ids) - 1, 1 + num_best), -7)  # of no use
        tables.append(
            (
                np.concatenate([prompt, ids]).astype(np.int32),
                np.concatenate([prompt, logprobs]).astype(np.float32),
            )
        )
    return tables


@pytest.mark.parametrize("support_size", [0, 4])
def test_columns_of_the_most_likely_tokens_are_those_of_the_whole_vocabulary(
    scored, expected, rollouts, support_size
):
    tables = make_tables(rollouts, expected, 1 + support_size)  # one may be the padding
    columns = best_columns(rollouts, tables, support_size, np.array([1]))
    columns["token_classes"] = columns["modal_ids"]  # the contract's, whoever scores
    for part, whole in zip(split_columns(rollouts, columns), scored, strict=True):
        assert np.isnan(part.teacher_unused_mass).all()
        assert np.array_equal(part.modal_ids, whole.modal_ids)
        names = ["teacher_logprobs", "teacher_modal_logprobs"]
        if support_size:
            assert np.array_equal(part.support_ids, whole.support_ids)
            names.append("support_logprobs")
        for name in names:
            assert np.abs(getattr(part, name) - getattr(whole, name)).max() < TOLERANCE


def test_special_tokens_are_left_out_of_the_most_likely(rollouts, expected, scored):
    modal = scored[0].modal_ids
    columns = best_columns(rollouts, make_tables(rollouts, expected, 8), 4, modal[:4])
    assert columns["support_ids"].shape == (len(columns["modal_ids"]), 4)
    assert not np.isin(columns["support_ids"], modal[:4]).any()
    assert (np.diff(columns["support_logprobs"], axis=1) <= 0).all()


@dataclasses.dataclass
class Flat:
    """vLLM's flat log-probabilities: nothing for the first token."""

    token_ids: list
    logprobs: list
    length: int

    def __len__(self):
        return self.length


def test_flat_lists_become_tables():
    flat = Flat([5, 9, 6, 9], [-1.0, -0.5, -2.0, -0.25], 3)
    ids, logprobs = _table(flat, np.array([4, 5, 6]), 1)
    assert ids.tolist() == [[5, 9], [6, 9]]
    assert logprobs.tolist() == [[-1.0, -0.5], [-2.0, -0.25]]


@pytest.mark.parametrize(
    "flat",
    [
        None,
        Flat([5, 9], [-1.0, -0.5], 2),  # too short
        Flat([5, 9, 6], [-1.0, -0.5, -2.0], 3),  # one is missing
        Flat([5, 9, 7, 9], [-1.0, -0.5, -2.0, -0.25], 3),  # of another token
    ],
)
def test_a_missing_logprob_is_an_error_and_never_zero(flat):
    with pytest.raises(RuntimeError, match=r"vLLM's log-probabilities"):
        _table(flat, np.array([4, 5, 6]), 1)


def test_unused_mass_is_the_sum_over_every_token_that_starts_an_unused_id(
    scored, expected, tokenizer
):
    num_starts = 0
    for part, (teacher, base) in zip(scored, expected, strict=True):
        num_items = part.rollout.prompt.num_items
        starts = oracles.id_starts(tokenizer, part.rollout.token_ids, num_items)
        defined = set(np.flatnonzero(~np.isnan(part.teacher_unused_mass)))
        assert defined == set(starts)
        assert defined == set(np.flatnonzero(~np.isnan(part.base_unused_mass)))
        for position, used in starts.items():
            for mass, rows in (
                (part.teacher_unused_mass, teacher),
                (part.base_unused_mass, base),
            ):
                total = oracles.unused_mass(tokenizer, rows[position], used, num_items)
                assert mass[position] == pytest.approx(total, rel=1e-4)  # masses of 6e-4 to 0.3
        num_starts += len(starts)
    assert num_starts == 16  # of COMPLETIONS: 3 + 2 + 4 + 1 + 0 + 0 + 3 + 3


def test_without_a_base_its_fields_are_none_and_all_others_the_same(scored, make_teacher, rollouts):
    teacher = make_teacher(micro_batch_size=3, support_size=4)
    alone = teacher.score(Generated(rollouts=rollouts, seconds=0.0)).rollouts
    for part, with_base in zip(alone, scored, strict=True):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name.startswith("base_"):
                assert value is None
            elif field.name != "rollout":
                np.testing.assert_array_equal(value, getattr(with_base, field.name))


def test_without_support_size_there_is_no_support(make_teacher, rollouts):
    (part,) = make_teacher().score(Generated(rollouts=rollouts[:1], seconds=0.0)).rollouts
    assert part.support_ids is None
    assert part.support_logprobs is None


def requests_for(rollouts, seed=3):
    return [Request(prompt=r.prompt, sample_index=0, seed=seed) for r in rollouts]


def test_the_teacher_generates_its_own_completions(make_teacher, rollouts, teacher_model):
    generated = make_teacher().generate(requests_for(rollouts[:3]), 6, greedy=True)
    for rollout, source in zip(generated.rollouts, rollouts, strict=False):
        prompt = source.prompt.token_ids
        tokens = oracles.greedy(teacher_model, prompt, end_ids=(0,), max_new_tokens=6)
        assert rollout.token_ids.tolist() == tokens
        assert rollout.finish_reason == ("stop" if tokens[-1] == 0 else "length")


# The transformers engine


@pytest.fixture(scope="module")
def make_engine(student_path):
    def make(path=student_path, **settings):
        options = dict(end_ids=(0,), max_new_tokens=7, batch_size=8)
        return HfEngine(
            model_path=str(path), dtype="float32", device="cpu", **{**options, **settings}
        )

    return make


def arrays_of(model, dtype):
    state = {name: tensor.to(dtype, copy=True) for name, tensor in model.state_dict().items()}
    as_bits = dtype == torch.bfloat16
    return {n: (t.view(torch.uint16) if as_bits else t).numpy() for n, t in state.items()}


def make_weights(model, dtype="float32"):
    return Weights(
        policy_version=1,
        tensors=arrays_of(model, getattr(torch, dtype)),
        dtype=dtype,
        canary_ids=np.zeros(2, dtype=np.int32),
        canary_logprobs=np.zeros(1, dtype=np.float32),
    )


def test_loaded_weights_serve_the_other_model(make_engine, teacher_path, student_model, canary_ids):
    engine = make_engine(teacher_path)
    expected = [
        row[token]
        for row, token in zip(
            oracles.prefix_logprobs(student_model, canary_ids[:1], canary_ids[1:]),
            canary_ids[1:],
            strict=True,
        )
    ]
    before = engine.prompt_logprobs(canary_ids)
    assert np.abs(before - expected).max() > 0.1, "the models must differ"
    engine.load_weights(make_weights(student_model))
    assert np.abs(engine.prompt_logprobs(canary_ids) - expected).max() < TOLERANCE


def test_bfloat16_travels_bit_for_bit(student_model):
    weights = make_weights(student_model, "bfloat16")
    assert all(array.dtype == np.uint16 for array in weights.tensors.values())
    state = student_model.state_dict()
    for name, tensor in torch_tensors(weights):
        assert torch.equal(tensor, state[name].bfloat16())


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weights_that_do_not_fit_are_refused(make_engine, student_model, change):
    weights = make_weights(student_model)
    name = "model.norm.weight"
    tensors = {n: t for n, t in weights.tensors.items() if n != name or change == "unknown"}
    if change == "unknown":
        tensors["model.norm.bias"] = weights.tensors[name]
    with pytest.raises(RuntimeError, match=r"model\.norm"):
        make_engine().load_weights(dataclasses.replace(weights, tensors=tensors))


def test_greedy_generation_is_the_stepwise_argmax_whatever_the_left_padding(
    make_engine, rollouts, student_model
):
    together = make_engine().generate(requests_for(rollouts), greedy=True)
    for rollout, completion in zip(rollouts, together, strict=True):
        prompt = rollout.prompt.token_ids
        tokens = oracles.greedy(student_model, prompt, end_ids=(0,), max_new_tokens=7)
        assert completion.token_ids == tokens


def test_reported_logprobs_are_those_of_the_policy_itself(make_engine, rollouts, student_model):
    completions = make_engine().generate(requests_for(rollouts), greedy=False)
    for rollout, completion in zip(rollouts, completions, strict=True):
        rows = oracles.prefix_logprobs(
            student_model, rollout.prompt.token_ids, completion.token_ids
        )
        expected = [row[token] for row, token in zip(rows, completion.token_ids, strict=True)]
        assert completion.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_generation_ends_with_the_first_end_token_and_keeps_it(
    make_engine, rollouts, student_model
):
    free = make_engine().generate(requests_for(rollouts), greedy=True)
    end_ids = (free[0].token_ids[3], free[4].token_ids[1])
    for rollout, completion in zip(
        rollouts, make_engine(end_ids=end_ids).generate(requests_for(rollouts), True), strict=True
    ):
        tokens = oracles.greedy(
            student_model, rollout.prompt.token_ids, end_ids=end_ids, max_new_tokens=7
        )
        assert completion.token_ids == tokens
        assert completion.stopped == (tokens[-1] in end_ids)
        assert len(completion.logprobs) == len(tokens)


def test_sampling_draws_from_the_whole_distribution(make_engine, rollouts, student_model):
    """First tokens of many draws against exact probabilities: no temperature, top-k or top-p."""
    prompt, num_draws = rollouts[0].prompt, 4000
    requests = [Request(prompt=prompt, sample_index=i, seed=i) for i in range(num_draws)]
    completions = make_engine(max_new_tokens=1, batch_size=num_draws).generate(requests, False)
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=340)
    (row,) = oracles.prefix_logprobs(student_model, prompt.token_ids, [0])
    exact = np.exp(row) * num_draws
    order = np.argsort(-exact)
    # Bins of at least 40 expected draws; χ² has mean n − 1 and deviation √(2(n − 1)).
    edges = [0]
    for index in range(len(order)):
        if exact[order[edges[-1] : index + 1]].sum() >= 40:
            edges.append(index + 1)
    bins = [order[a:b] for a, b in zip(edges[:-1], [*edges[1:-1], len(order)], strict=True)]
    chi2 = sum((counts[b].sum() - exact[b].sum()) ** 2 / exact[b].sum() for b in bins)
    assert len(bins) > 20
    assert chi2 < len(bins) - 1 + 5 * np.sqrt(2 * (len(bins) - 1))


def test_the_seed_fixes_the_samples(make_engine, rollouts):
    engine = make_engine()

    def sample(seed):
        requests = requests_for(rollouts, seed=seed)
        return [completion.token_ids for completion in engine.generate(requests, False)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampling_defaults_of_the_checkpoint_are_ignored(
    make_engine, rollouts, student_path, student_model, tmp_path
):
    """Real checkpoints ship penalties and truncation: Qwen2.5 has repetition_penalty 1.05."""
    path = tmp_path / "model"
    shutil.copytree(student_path, path)
    file = path / "generation_config.json"
    defaults = {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 50.0,
        "no_repeat_ngram_size": 1,
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    requests = requests_for(rollouts)
    spoiled, plain = (make_engine(p).generate(requests, False) for p in (path, student_path))
    assert [c.token_ids for c in spoiled] == [c.token_ids for c in plain]
    for rollout, completion in zip(
        rollouts, make_engine(path).generate(requests, True), strict=True
    ):
        prompt = rollout.prompt.token_ids
        tokens = oracles.greedy(student_model, prompt, end_ids=(0,), max_new_tokens=7)
        assert completion.token_ids == tokens


@pytest.mark.parametrize(
    ("settings", "reshape"),
    [
        (dict(temperature=0.5), lambda row, is_id: row if is_id else 2 * row),
        (dict(id_temperature=2.0), lambda row, is_id: row / 2 if is_id else row),
        (dict(uniform_share=0.1), lambda row, _: np.log(0.9 * np.exp(row) + 0.1 / len(row))),
    ],
)
def test_a_reshaped_teacher_scores_with_the_distribution_asked_for(
    make_teacher, scored, expected, rollouts, settings, reshape
):
    reshaped = make_teacher(**settings).score(Generated(rollouts=rollouts, seconds=0.0))
    for part, plain, (teacher, _) in zip(reshaped.rollouts, scored, expected, strict=True):
        for t, token in enumerate(part.rollout.token_ids):
            row = reshape(teacher[t], plain.token_classes[t] == TokenClass.ITEM_ID)
            row = row - math.log(np.exp(row).sum())
            assert part.teacher_logprobs[t] == pytest.approx(row[token], abs=TOLERANCE)
            assert part.teacher_modal_logprobs[t] == pytest.approx(row.max(), abs=TOLERANCE)


def test_the_start_up_gate_scores_with_the_checkpoint_as_it_is(
    make_teacher, student_path, rollouts
):
    generated = Generated(rollouts=rollouts, seconds=0.0)
    plain = make_teacher().score_with(str(student_path), generated)
    reshaped = make_teacher(temperature=0.5, uniform_share=0.1)
    for part, other in zip(
        reshaped.score_with(str(student_path), generated).rollouts, plain.rollouts, strict=True
    ):
        assert np.array_equal(part.teacher_logprobs, other.teacher_logprobs)


@pytest.mark.parametrize("num_bases", [1, 2])
def test_every_call_is_scored_with_its_own_base(
    teacher_path, base_path, student_path, rollouts, num_bases
):
    def make():
        settings = TeacherActorConfig()
        options = dict(dtype="float32", device="cpu", num_bases=num_bases)
        return Teacher(settings, teacher_path=str(teacher_path), **options)

    generated, shared = Generated(rollouts=rollouts, seconds=0.0), make()
    alone = {p: make().score(generated, str(p)).rollouts for p in (base_path, student_path)}
    for path in (base_path, student_path, base_path):
        for part, other in zip(
            shared.score(generated, str(path)).rollouts, alone[path], strict=True
        ):
            assert np.array_equal(part.base_logprobs, other.base_logprobs)
    assert len(shared._bases) == num_bases
    assert shared.score(generated).rollouts[0].base_logprobs is None
