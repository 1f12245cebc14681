import json
import math

import pytest

from listopd_ray.config import AlarmConfig, Config, GovernorConfig, Schedule, schedule_value
from listopd_ray.steering import Steering, check_prediction, predicted_threshold
from listopd_ray.types import ListopdError

P, B = 0.7, 0.35
STAR = 1 + math.log(2) / (math.log(P / (1 - P)) - math.log(B / (1 - B)))  # at c = 2
GOVERNED = GovernorConfig(enabled=True, margin=0.25)


def steering(num_rollbacks=0, prediction=None, **settings):
    config = Config(prediction=prediction and str(prediction), num_steps=10, **settings)
    return Steering(config, num_rollbacks)


def alarm(action, **settings):
    """Rings at the first bad step."""
    return AlarmConfig(action=action, patience=1, **settings)


def seen(parse_rate=0.8, p=P, b=B):
    """Metrics of one update, with the masses of a class that binds."""
    masses = {"teacher": p, "base": b, "student": 0.4}
    return {"contract/parse_rate": parse_rate} | {
        f"cliff/{owner}_mass_item_id": mass for owner, mass in masses.items()
    }


def ring(steered, lam=2.0, step=7):
    """Outputs were fine and parse no more; the event of the alarm, at its second bad step."""
    steered.observe(seen(0.8), lam)
    assert steered.event(step - 2, lam) is None
    for _ in range(2):  # the average over steps falls below half
        steered.observe(seen(0.0), lam)
    return steered.event(step, lam)


@pytest.fixture
def write_prediction(tmp_path):
    def write(content):
        file = tmp_path / "prediction.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 1.7, 2, 5.0])
@pytest.mark.parametrize("kind", ["constant", "warmup", "linear"])
def test_without_a_governor_lam_is_what_was_asked_bit_for_bit(lam, kind):
    schedule = Schedule(kind=kind, initial=1.1, steps=3, final=1.3)
    steered = steering(lam=lam, lam_schedule=schedule)
    for step in range(10):
        used = steered.lam(step)
        assert used == schedule_value(schedule, lam, step, 10)
        assert isinstance(used, float)
        metrics = steered.observe(seen(), used)
        assert metrics["cliff/lambda_star"] == pytest.approx(STAR)  # measured all the same
        assert metrics["cliff/headroom"] == pytest.approx(STAR - used)


@pytest.mark.parametrize("settings", [{"lam": 5.0, "governor": GOVERNED}, {"lam": "auto"}])
def test_a_governed_run_begins_at_one_and_then_stays_the_margin_below_the_measured_cliff(settings):
    steered = steering(**settings)
    assert steered.lam(0) == 1.0
    steered.observe(seen(), 1.0)
    margin = Config(**settings).governor.margin
    assert steered.lam(1) == pytest.approx(1 + (1 - margin) * (STAR - 1), rel=1e-12)
    if settings["lam"] != "auto":
        below = steering(lam=1.05, governor=GOVERNED)
        below.observe(seen(), 1.0)
        assert below.lam(1) == 1.05  # the cap only lowers


def test_a_prediction_holds_until_the_run_has_measured(write_prediction):
    file = write_prediction({"lambda_star": 1.8, "clip": 2.0})
    steered = steering(lam=5.0, governor=GOVERNED, prediction=file)
    assert steered.lam(0) == pytest.approx(1.6)
    steered.observe(seen(), 1.6)
    assert steered.lam(1) == pytest.approx(1 + 0.75 * (STAR - 1))
    assert steering(lam=5.0, prediction=file).lam(0) == 5.0  # without a governor only recorded


def test_a_prediction_that_found_no_cliff_says_nothing(write_prediction):
    file = write_prediction({"lambda_star": None, "clip": None})
    assert steering(lam=5.0, governor=GOVERNED, prediction=file, clip=math.inf).lam(0) == 1.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"lambda_star": 1.5, "clip": 3.0}, "is for c = 3, the run has c = 2"),
        ({"lambda_star": 1.5, "clip": None}, "is for c = inf, the run has c = 2"),
        ({"lambda_star": 1.5}, "no prediction.json of `listopd calibrate`"),
        ({"clip": 2.0}, "no prediction.json of `listopd calibrate`"),
        ([1.5], "no prediction.json of `listopd calibrate`"),
        ({"lambda_star": "x", "clip": 2.0}, "lambda_star is 'x', not a number ≥ 1"),
        ({"lambda_star": math.nan, "clip": 2.0}, "lambda_star is nan, not a number ≥ 1"),
        ({"lambda_star": 0.3, "clip": 2.0}, "lambda_star is 0.3, not a number ≥ 1"),
        ({"lambda_star": 1.3, "clip": "x"}, "clip is 'x', not a number ≥ 1"),
        ({"lambda_star": 1.3, "clip": 2.0, "escape": []}, "escape is [], not a number ≥ 1"),
        ("{", "not JSON"),
        (None, "No such file or directory"),
    ],
)
def test_a_prediction_that_is_none_of_this_run_ends_in_one_line(
    tmp_path, write_prediction, content, words
):
    file = tmp_path / "prediction.json" if content is None else write_prediction(content)
    config = Config(prediction=str(file), clip=2.0)
    for read in (predicted_threshold, lambda config: Steering(config, 0)):
        with pytest.raises(ListopdError) as raised:
            read(config)
        assert str(raised.value) == f"prediction: {file}: {words}"


def test_the_smaller_of_lambda_star_and_escape_is_the_prediction(write_prediction):
    for escape, threshold in ((1.1, 1.1), (1.7, 1.5), (None, 1.5)):
        file = write_prediction({"lambda_star": 1.5, "escape": escape, "clip": 2.0})
        assert predicted_threshold(Config(prediction=file, clip=2.0)) == threshold


def test_a_prediction_for_other_models_is_refused(write_prediction):
    made_for = {"data": ["d"], "teacher": ["t"], "warm_start": ["w0", "w1"], "base": ["w0"]}
    file = write_prediction({"lambda_star": 1.5, "clip": 2.0, "hashes": made_for})
    config = Config(prediction=file, clip=2.0)
    ours = {"data": "d", "teacher": "t", "warm_start": "w1"}
    check_prediction(config, ours)
    for name in ours:
        with pytest.raises(ListopdError, match=f"was made for another {name}$"):
            check_prediction(config, ours | {name: "other"})
    calibrated = write_prediction({"lambda_star": 1.5, "clip": 2.0})
    check_prediction(Config(prediction=calibrated, clip=2.0), ours)


@pytest.mark.parametrize(
    ("settings", "steers"), [({}, False), ({"lam": "auto"}, True), ({"governor": GOVERNED}, True)]
)
def test_a_prediction_out_of_scope_is_said_where_it_steers(
    write_prediction, capsys, settings, steers
):
    file = write_prediction({"lambda_star": 1.5, "clip": 2.0, "out_of_scope": ["no headroom"]})
    check_prediction(Config(prediction=str(file), clip=2.0, **settings), {})
    said = f"prediction: {file}: out of scope: no headroom\n"
    assert capsys.readouterr().err == (said if steers else "")


@pytest.mark.parametrize("asked", [3.0, 0.5])
def test_every_roll_back_keeps_backoff_of_the_distance_to_one(asked):
    for number in range(4):
        steered = steering(number, lam=asked, alarm=AlarmConfig(backoff=0.4))
        assert steered.lam(0) == pytest.approx(1 + (asked - 1) * 0.4**number, rel=1e-15)
    assert steering(1, lam=asked, alarm=AlarmConfig(backoff=0.0)).lam(0) == 1.0


def test_a_roll_back_lowers_the_cap_of_the_governor_too():
    steered = steering(1, lam=5.0, governor=GOVERNED, alarm=AlarmConfig(backoff=0.5))
    steered.observe(seen(), 1.0)
    assert steered.lam(1) == pytest.approx(1 + 0.5 * 0.75 * (STAR - 1))


def test_a_warning_is_given_once_until_outputs_are_healthy_again():
    steered = steering(lam=2.0, alarm=alarm("warn"))
    event = ring(steered, lam=2.0, step=7)
    reason = "training parses 0.179, best was 0.800 (2 steps in a row)"
    assert event == {"step": 7, "action": "warn", "reason": reason, "lam": 2.0}
    for step in range(8, 12):
        steered.observe(seen(0.0), 2.0)
        assert steered.event(step, 2.0) is None
    for step in range(12, 30):  # well again
        steered.observe(seen(0.8), 2.0)
        assert steered.event(step, 2.0) is None
    assert steered.healthy
    assert ring(steered, step=33)["action"] == "warn"
    assert steered.lam(1) == 2.0  # a warning changes nothing


def test_a_warning_given_before_a_checkpoint_is_not_given_again_after_it():
    before, resumed = steering(alarm=alarm("warn")), steering(alarm=alarm("warn"))
    assert ring(before)
    resumed.restore(json.loads(json.dumps(before.state())))
    resumed.observe(seen(0.0), 2.0)
    assert resumed.event(8, 2.0) is None


def test_a_recovery_that_is_not_complete_brings_no_second_warning():
    steered = steering(alarm=alarm("warn"))
    assert ring(steered)
    for parse_rate in (0.6, 0.6, 0.6):  # above half of the best, below 0.9 of it
        steered.observe(seen(parse_rate), 1.0)
        steered.event(8, 1.0)
    assert not steered.healthy
    for _ in range(3):
        steered.observe(seen(0.0), 1.0)
        assert steered.event(9, 1.0) is None


def test_after_the_last_roll_back_the_run_stops():
    steered = steering(lam=3.0, alarm=alarm("rollback", max_rollbacks=2))
    steered.observe(seen(0.8), 3.0)
    kept = steered.state()
    for expected, lam in (("rollback", 2.0), ("rollback", 1.5), ("stop", 1.5)):
        assert ring(steered, lam=steered.lam(0))["action"] == expected
        steered.restore(kept)
        assert steered.lam(0) == lam
    # A resumed process knows how many there were.
    assert ring(steering(2, alarm=alarm("rollback", max_rollbacks=2)))["action"] == "stop"
    assert ring(steering(1, alarm=alarm("rollback", max_rollbacks=2)))["action"] == "rollback"
    assert ring(steering(alarm=alarm("rollback", max_rollbacks=0)))["action"] == "stop"
    assert ring(steering(alarm=alarm("stop")))["action"] == "stop"


def test_a_collapse_is_forgotten_with_the_state_from_before_it():
    steered = steering(lam=3.0, alarm=alarm("rollback"))
    steered.observe(seen(0.8), 3.0)
    kept = json.loads(json.dumps(steered.state(), allow_nan=False))
    assert ring(steered)
    assert not steered.healthy
    steered.restore(kept)
    assert steered.healthy
    assert steered.event(2, 2.0) is None
    steered.observe(seen(0.75), 2.0)
    assert steered.event(2, 2.0) is None


def test_a_restored_steering_goes_on_as_the_uninterrupted_one():
    rates = [0.8, 0.7, 0.75, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    bases = [0.3, 0.35, 0.32, 0.4, 0.38, 0.31, 0.36, 0.33, 0.37]
    for cut in range(1, 8):
        settings = {"lam": "auto", "alarm": AlarmConfig(action="rollback", patience=2)}
        whole, resumed = steering(**settings), steering(**settings)
        for rate, b in zip(rates[:cut], bases[:cut], strict=True):
            whole.observe(seen(rate, b=b), 1.1)
        resumed.restore(json.loads(json.dumps(whole.state(), allow_nan=False)))
        events = []
        for step in range(cut, 9):
            assert whole.lam(step) == resumed.lam(step)
            metrics = seen(rates[step], b=bases[step])
            assert whole.observe(metrics, 1.1) == resumed.observe(metrics, 1.1)
            assert whole.healthy is resumed.healthy
            events.append(whole.event(step, 1.1))
            assert events[-1] == resumed.event(step, 1.1)
            assert whole.state() == resumed.state()
        assert events[-1] is not None


def test_a_bad_evaluation_alone_rings():
    steered = steering(alarm=alarm("rollback"))
    steered.observe({"eval/parse_rate": 0.8}, 1.0)  # of the warm start
    steered.observe(seen(0.8), 1.0)
    assert steered.event(1, 1.0) is None
    steered.observe(seen(0.8) | {"eval/parse_rate": 0.3}, 1.0)
    assert not steered.healthy
    event = steered.event(2, 1.0)
    assert event["reason"] == "evaluation parses 0.300, best was 0.800"
