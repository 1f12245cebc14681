import numpy as np
import pytest
from fakes import make_rollout, make_scored

from listopd_ray.ledger import Ledger, admit, committed
from listopd_ray.roles.rollout import Generated
from listopd_ray.roles.teacher import Scored
from listopd_ray.tracking import read_jsonl
from listopd_ray.types import ListopdError


def generated(*prompt_ids, version=0, attempt=0, copies=1):
    rollouts = tuple(
        make_rollout([1], [2, 3], prompt_id=p, policy_version=version, sample_index=index)
        for p in prompt_ids
        for index in range(copies)
    )
    return Generated(rollouts=rollouts, seconds=0.0, attempt=attempt)


def scored(*rollouts):
    return Scored(rollouts=tuple(map(make_scored, rollouts)), seconds=0.0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_every_sample_is_in_one_update_with_its_version_and_attempt(file):
    ledger = Ledger(file)
    ledger.begin(0)
    parts = [generated("a", copies=2), generated("b", version=0, attempt=1)]
    ledger.commit(1, parts, dropped=[("a", 1, "teacher")])
    ledger.commit(2, [generated("a", version=1)], dropped=[])
    updates = committed(read_jsonl(file))
    assert updates[1]["samples"] == [
        {"version": 0, "attempt": 0, "ids": [["a", 0]]},
        {"version": 0, "attempt": 1, "ids": [["b", 0]]},
    ]
    assert updates[1]["dropped"] == [["a", 1, "teacher"]]
    assert [row["incarnation"] for row in updates.values()] == [1, 1]


def test_what_a_learner_did_after_the_state_that_the_next_begins_with_is_void(file):
    ledger = Ledger(file)
    ledger.begin(0)
    for update in (1, 2, 3):
        ledger.commit(update, [generated(f"first {update}")], [])
    ledger.begin(1)
    ledger.commit(2, [generated("second 2")], [])
    ledger = Ledger(file)  # another process
    ledger.begin(2)
    ledger.commit(3, [generated("third 3")], [])
    updates = committed(read_jsonl(file))
    ids = [updates[n]["samples"][0]["ids"][0][0] for n in (1, 2, 3)]
    assert ids == ["first 1", "second 2", "third 3"]
    assert [row["incarnation"] for row in updates.values()] == [1, 2, 3]
    assert len(read_jsonl(file)) == 8  # nothing that was is forgotten


def test_a_line_that_a_crash_cut_short_is_dropped(file):
    Ledger(file).begin(0)
    with file.open("a") as stream:
        stream.write('{"update": 1, "inca')
    ledger = Ledger(file)
    ledger.begin(0)
    ledger.commit(1, [generated("a")], [])
    assert [row["incarnation"] for row in committed(read_jsonl(file)).values()] == [2]


def entry(update, *ids, incarnation=1, dropped=()):
    samples = [{"version": 0, "attempt": 0, "ids": [[i, 0] for i in ids]}]
    return {
        "update": update,
        "incarnation": incarnation,
        "samples": samples,
        "dropped": [list(key) for key in dropped],
    }


def begin(incarnation, step):
    return {"incarnation": incarnation, "from": step}


@pytest.mark.parametrize(
    "rows",
    [
        [begin(1, 0), entry(2, "a")],
        [begin(1, 0), entry(1, "a"), entry(1, "b")],
        [begin(1, 0), entry(1, "a"), entry(3, "b")],
        [begin(1, 0), entry(1, "a", "b", "a")],
        [begin(1, 0), entry(1, "a", dropped=[("a", 0, "teacher")])],
        [begin(1, 0), entry(1, "a"), begin(2, 1), entry(2, "b", incarnation=1)],
        [begin(1, 0), entry(1, "a"), begin(2, 2)],
        [begin(1, 0), begin(3, 0)],
        [entry(1, "a")],
    ],
)
def test_gaps_duplicates_and_rows_of_a_replaced_learner_are_found(rows):
    with pytest.raises(ListopdError, match="ledger: "):
        committed(rows)


NAN = np.array([0.0, np.nan], dtype=np.float32)


def drawn(part):
    return [Generated(rollouts=tuple(s.rollout for s in part.rollouts), seconds=0.0)]


MINUS_INF = np.array([-np.inf, 0.0], dtype=np.float32)
SHORT = np.zeros(1, dtype=np.float32)


@pytest.mark.parametrize("bad", [NAN, MINUS_INF, SHORT, SHORT[:0], None], ids=str)
@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("teacher_logprobs", "teacher"),
        ("teacher_modal_logprobs", "teacher"),
        ("base_logprobs", "base"),
        ("base_modal_logprobs", "base"),
    ],
)
def test_a_sample_whose_scores_are_missing_or_not_finite_is_dropped_alone(bad, column, reason):
    part = scored(*(make_rollout([1], [2, 3], prompt_id=p) for p in "abc"))
    for s in part.rollouts:
        object.__setattr__(s, "base_logprobs", s.teacher_logprobs)
        object.__setattr__(s, "base_modal_logprobs", s.teacher_logprobs)
    object.__setattr__(part.rollouts[1], column, bad)
    (fit,), dropped = admit(drawn(part), [part], version=0, max_staleness=0)
    assert [s.rollout.prompt.id for s in fit.rollouts] == ["a", "c"]
    assert dropped == [("b", 0, reason)]


def test_so_is_one_whose_sampler_gave_no_number():
    bad = make_rollout([1], [2, 3], prompt_id="a", sampler_logprobs=NAN)
    part = scored(bad)
    fit, dropped = admit(drawn(part), [part], version=0, max_staleness=0)
    assert (fit, dropped) == ([], [("a", 0, "sampler")])  # a part without samples goes


@pytest.mark.parametrize(
    ("max_staleness", "fit_versions"), [(0, [5]), (1, [4, 5])], ids=["on-policy", "one behind"]
)
def test_samples_of_older_weights_and_of_weights_that_are_void_are_dropped(
    max_staleness, fit_versions
):
    versions = [3, 4, 5, 6]
    part = scored(
        *(make_rollout([1], [2, 3], prompt_id=f"{v}", policy_version=v) for v in versions)
    )
    (fit,), dropped = admit(drawn(part), [part], version=5, max_staleness=max_staleness)
    assert [s.rollout.policy_version for s in fit.rollouts] == fit_versions
    assert {reason for _, _, reason in dropped} == {"version"}
    assert len(dropped) == 4 - len(fit_versions)


def test_what_is_fit_is_handed_on_as_it_is():
    part = scored(make_rollout([1], [2, 3]))
    assert admit(drawn(part), [part], version=0, max_staleness=0) == ([part], [])


def test_a_sample_that_the_teacher_does_not_return_is_missing_not_trained():
    whole = scored(*(make_rollout([1], [2, 3], prompt_id=p) for p in "abc"))
    part = Scored(rollouts=whole.rollouts[::2], seconds=0.0)
    (fit,), dropped = admit(drawn(whole), [part], version=0, max_staleness=0)
    assert [s.rollout.prompt.id for s in fit.rollouts] == ["a", "c"]
    assert dropped == [("b", 0, "missing")]
