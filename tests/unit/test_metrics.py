import json
import math
import random

import pytest

from listopd_ray.task.contract import REASONS, answer_text, judge
from listopd_ray.task.metrics import evaluate_judged, evaluation_to_dict
from listopd_ray.types import Judged


def parsed(example_id, *ranking):
    return judge(example_id, answer_text(ranking), len(ranking), "stop")


def unparsed(example_id, reason="not_json"):
    return Judged(example_id=example_id, text="?", ranking=None, reason=reason)


def oracle_ndcg(ranking, gains, k):
    def discounted(ordered):
        return sum(gain / math.log2(place + 2) for place, gain in enumerate(ordered[:k]))

    return discounted([gains[item - 1] for item in ranking]) / discounted(sorted(gains)[::-1])


def oracle_tau(ranking, gains):
    """τ-b by counting pairs: the ranking has no ties, the gains may."""
    place = {item: position for position, item in enumerate(ranking)}
    balance = untied = pairs = 0
    for first in range(1, len(gains) + 1):
        for second in range(1, first):
            difference = gains[first - 1] - gains[second - 1]
            pairs += 1
            if difference:
                untied += 1
                balance += 1 if (difference > 0) == (place[first] < place[second]) else -1
    return balance / math.sqrt(pairs * untied)


def random_outputs(num_prompts, seed):
    generator = random.Random(seed)
    relevance, judged = {}, []
    for number in range(num_prompts):
        num_items = generator.randint(2, 10)
        gains = [float(generator.randint(0, 3)) for _ in range(num_items)]
        gains[:2] = [0.0, 1.0]  # some relevance, not constant
        relevance[str(number)] = gains
        ranking = generator.sample(range(1, num_items + 1), num_items)
        judged.append(parsed(str(number), *ranking))
    return judged, relevance


def test_rank_metrics_agree_with_values_worked_out_by_hand():
    # Order of gains: 1, 3, 0. Pairs: (3, 1) discordant, (3, 0) and (1, 0) concordant.
    evaluation = evaluate_judged([parsed("e", 2, 1, 3)], {"e": [3.0, 1.0, 0.0]})
    assert evaluation.ndcg_at_1.value == pytest.approx(1 / 3)
    ndcg = (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert evaluation.ndcg_at_k.value == pytest.approx(ndcg)
    assert evaluation.kendall_tau.value == pytest.approx(1 / 3)
    assert evaluation.ndcg_at_k_all == evaluation.ndcg_at_k


def test_rank_metrics_agree_with_a_loop_over_pairs_and_places():
    judged, relevance = random_outputs(40, seed=1)
    for output in judged:
        gains = relevance[output.example_id]
        evaluation = evaluate_judged([output], relevance)
        assert evaluation.ndcg_at_1.value == pytest.approx(oracle_ndcg(output.ranking, gains, 1))
        assert evaluation.ndcg_at_k.value == pytest.approx(
            oracle_ndcg(output.ranking, gains, len(gains))
        )
        assert evaluation.kendall_tau.value == pytest.approx(oracle_tau(output.ranking, gains))


def test_the_best_ranking_scores_one_and_its_reverse_has_tau_minus_one():
    relevance = {"e": [1.0, 3.0, 2.0]}
    best = evaluate_judged([parsed("e", 2, 3, 1)], relevance)
    assert best.ndcg_at_1.value == best.ndcg_at_k.value == best.kendall_tau.value == 1.0
    assert evaluate_judged([parsed("e", 1, 3, 2)], relevance).kendall_tau.value == -1.0


def test_unparsed_outputs_count_as_zero_only_in_the_metrics_of_all_outputs():
    relevance = {prompt: [1.0, 0.0] for prompt in "abcd"}
    judged = [parsed("a", 1, 2), parsed("b", 1, 2), parsed("c", 1, 2), unparsed("d")]
    evaluation = evaluate_judged(judged, relevance)
    for name in ("ndcg_at_1", "ndcg_at_k", "kendall_tau"):
        assert getattr(evaluation, name).value == 1.0
        estimate = getattr(evaluation, f"{name}_all")
        assert estimate.value == 0.75
        assert estimate.low < 0.75 < estimate.high == 1.0
    assert evaluation.parse_rate.value == 0.75


def test_prompts_without_relevance_are_left_out_of_rank_metrics_and_counted():
    relevance = {"a": [0.0, 0.0], "b": [0.0, 1.0], "c": [0.0, 0.0]}
    judged = [parsed("a", 1, 2), parsed("b", 2, 1), unparsed("c")]
    evaluation = evaluate_judged(judged, relevance)
    assert evaluation.num_prompts == 3
    assert evaluation.num_without_relevance == 2
    assert evaluation.ndcg_at_1_all.value == evaluation.kendall_tau_all.value == 1.0
    assert evaluation.parse_rate.value == pytest.approx(2 / 3)


def test_constant_relevance_leaves_a_prompt_out_of_tau_only():
    relevance = {"a": [2.0, 2.0], "b": [1.0, 0.0], "c": [2.0, 2.0]}
    judged = [parsed("a", 1, 2), parsed("b", 2, 1), unparsed("c")]
    evaluation = evaluate_judged(judged, relevance)
    assert evaluation.ndcg_at_1.value == 0.5
    assert evaluation.ndcg_at_1_all.value == pytest.approx(1 / 3)
    assert evaluation.kendall_tau.value == evaluation.kendall_tau_all.value == -1.0
    assert evaluation.num_without_relevance == 0


def test_a_list_of_one_item_is_ranked_perfectly_and_has_no_tau():
    evaluation = evaluate_judged([parsed("a", 1)], {"a": [2.0]})
    assert evaluation.ndcg_at_1.value == evaluation.ndcg_at_k.value == 1.0
    assert math.isnan(evaluation.kendall_tau.value)


def test_the_parse_rate_has_the_wilson_interval():
    judged = [parsed(str(number), 1, 2) for number in range(8)] + [unparsed("8"), unparsed("9")]
    estimate = evaluate_judged(judged, {str(n): [1.0, 0.0] for n in range(10)}).parse_rate
    z, n, share = 1.959964, 10, 0.8
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert estimate.low == pytest.approx(centre - half, abs=1e-6)
    assert estimate.high == pytest.approx(centre + half, abs=1e-6)


def test_the_bootstrap_interval_is_near_the_normal_one_and_repeats_with_its_seed():
    judged, relevance = random_outputs(200, seed=2)
    first = evaluate_judged(judged, relevance, seed=3)
    assert evaluate_judged(judged, relevance, seed=3) == first
    assert evaluate_judged(judged, relevance, seed=4) != first
    scores = [oracle_tau(output.ranking, relevance[output.example_id]) for output in judged]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    half = 1.96 * deviation / math.sqrt(len(scores))
    assert first.kendall_tau.value == pytest.approx(mean)
    assert first.kendall_tau.low == pytest.approx(mean - half, abs=0.15 * half)
    assert first.kendall_tau.high == pytest.approx(mean + half, abs=0.15 * half)


def test_several_outputs_of_a_prompt_are_one_unit_of_the_average_and_the_bootstrap():
    relevance = {"a": [1.0, 0.0], "b": [1.0, 0.0]}
    judged = [parsed("a", 1, 2)] * 9 + [parsed("b", 1, 2), parsed("b", 2, 1)]
    evaluation = evaluate_judged(judged, relevance)
    assert evaluation.num_prompts == 2
    assert evaluation.ndcg_at_1.value == 0.75  # of prompts: 1 and 1/2
    assert (evaluation.ndcg_at_1.low, evaluation.ndcg_at_1.high) == (0.5, 1.0)
    same = evaluate_judged([parsed("a", 1, 2), parsed("a", 2, 1)], relevance).ndcg_at_1
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)


def test_nothing_to_average_is_nan_and_becomes_null_in_json():
    for judged in ([], [unparsed("a")]):
        evaluation = evaluate_judged(judged, {"a": [1.0, 0.0]})
        assert math.isnan(evaluation.ndcg_at_k.value)
        assert math.isnan(evaluation.ndcg_at_k.low)
        as_dict = evaluation_to_dict(evaluation)
        assert as_dict["ndcg_at_k"] is None
        assert as_dict["ndcg_at_k_interval"] == [None, None]
        json.dumps(as_dict, allow_nan=False)


def test_reasons_are_counted_in_their_fixed_order():
    judged = [unparsed("a", "wrong_schema"), unparsed("b", "truncated"), parsed("c", 1, 2)]
    judged += [unparsed("d", "wrong_schema")]
    reasons = evaluate_judged(judged, {prompt: [1.0, 0.0] for prompt in "abcd"}).reasons
    assert tuple(reasons) == REASONS
    assert {reason: count for reason, count in reasons.items() if count} == {
        "truncated": 1,
        "wrong_schema": 2,
    }


def test_the_dictionary_holds_every_number_with_its_interval():
    judged = [parsed("a", 1, 2), unparsed("b")]
    evaluation = evaluate_judged(judged, {"a": [1.0, 0.0], "b": [1.0, 0.0]})
    as_dict = json.loads(json.dumps(evaluation_to_dict(evaluation), allow_nan=False))
    assert as_dict["parse_rate"] == 0.5
    assert as_dict["ndcg_at_k"] == 1.0
    assert as_dict["ndcg_at_k_interval"] == [1.0, 1.0]
    assert as_dict["kendall_tau_all"] == 0.5
    assert as_dict["kendall_tau_all_interval"] == [0.0, 1.0]
    assert (as_dict["num_prompts"], as_dict["num_without_relevance"]) == (2, 0)
    assert as_dict["reasons"]["not_json"] == 1


def test_a_judged_prompt_without_gains_is_an_error():
    with pytest.raises(KeyError):
        evaluate_judged([parsed("a", 1, 2)], {})
