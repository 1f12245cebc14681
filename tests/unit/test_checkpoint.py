import shutil

import pytest
from fakes import FakeLearner

from listopd_ray.checkpoint import drop_unhealthy, mark_healthy, restore_latest, save_checkpoint


@pytest.fixture
def learner():
    return FakeLearner(events=[])


def save(root, learner, step, keep=2, healthy=False, **state):
    learner.policy_version = step
    save_checkpoint(root, step, learner, state, keep=keep, healthy=healthy)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path, learner):
    learner.policy_version = 5
    assert restore_latest(tmp_path / "nowhere", learner) is None
    assert restore_latest(tmp_path, learner) is None
    assert learner.policy_version == 5


def test_the_newest_checkpoint_comes_back_with_its_state(tmp_path, learner):
    for step in (9, 10, 100):  # 100 follows 9 also by name
        save(tmp_path, learner, step, prompts={"position": step})
    fresh = FakeLearner(events=[])
    assert restore_latest(tmp_path, fresh) == {"step": 100, "prompts": {"position": 100}}
    assert fresh.policy_version == 100


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(tmp_path, learner, keep):
    for step in (1, 2, 3):
        save(tmp_path, learner, step, keep=keep)
    assert names(tmp_path) == ["step-000002", "step-000003"][-keep:]


def test_a_save_that_fails_leaves_the_one_before_in_force(tmp_path, learner):
    save(tmp_path, learner, 1)

    class DiskFull(FakeLearner):
        def save(self, directory):
            super().save(directory)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, DiskFull(events=[]), 2, keep=1)
    fresh = FakeLearner(events=[])
    assert restore_latest(tmp_path, fresh)["step"] == 1
    assert fresh.policy_version == 1


def test_remains_of_a_failed_save_are_replaced(tmp_path, learner):
    partial = tmp_path / "step-000002.tmp"
    partial.mkdir()
    (partial / "half").write_text("written")
    save(tmp_path, learner, 2)
    assert names(tmp_path) == ["step-000002"]
    assert not (tmp_path / "step-000002" / "half").exists()


def test_a_step_saved_again_replaces_the_first(tmp_path, learner):
    save(tmp_path, learner, 2, attempt=1)
    save(tmp_path, learner, 2, attempt=2)
    assert restore_latest(tmp_path, learner)["attempt"] == 2
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize(
    ("healthy", "kept"),
    [
        ([0], [0, 4, 5]),  # outside the newest two, and kept
        ([0, 1, 2], [2, 4, 5]),  # of the healthy ones only the newest
        ([0, 4], [4, 5]),
        ([0, 1, 2, 3, 4, 5], [4, 5]),
        ([], [4, 5]),
    ],
    ids=str,
)
def test_the_newest_healthy_one_is_kept_beside_the_newest(tmp_path, learner, healthy, kept):
    for step in range(6):
        save(tmp_path, learner, step, healthy=step in healthy)
        if healthy:
            newest = max(s for s in healthy if s <= step)
            assert f"step-{newest:06d}" in names(tmp_path)  # at any time
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]


def test_a_checkpoint_may_turn_out_healthy_later(tmp_path, learner):
    for step in range(4):
        save(tmp_path, learner, step, keep=2, healthy=step == 0)
        mark_healthy(tmp_path, step - 1)  # of none before the first
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    mark_healthy(tmp_path, 0)  # gone already, and not to come back
    drop_unhealthy(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(
    ("healthy", "left"),
    [([1], [1]), ([1, 2, 3], [1, 2, 3]), ([2], [1, 2]), ([], [1, 2, 3]), ([1, 3], [1, 2, 3])],
    ids=str,
)
def test_what_came_after_the_newest_healthy_one_can_be_dropped(tmp_path, learner, healthy, left):
    for step in (1, 2, 3):
        save(tmp_path, learner, step, keep=3, healthy=step in healthy)
    drop_unhealthy(tmp_path)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]
    fresh = FakeLearner(events=[])
    assert restore_latest(tmp_path, fresh)["step"] == fresh.policy_version == left[-1]


def test_a_process_that_ends_while_it_removes_leaves_only_whole_checkpoints(
    tmp_path, learner, monkeypatch
):
    for step in (1, 2, 3):
        save(tmp_path, learner, step, keep=3, healthy=step == 1)

    def remove_half(path):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(KeyboardInterrupt):
            drop_unhealthy(tmp_path)  # the newest goes first: what is left was a run's state once
        assert restore_latest(tmp_path, learner)["step"] == 2
        with pytest.raises(KeyboardInterrupt):
            drop_unhealthy(tmp_path)
        assert restore_latest(tmp_path, learner)["step"] == 1
    save(tmp_path, learner, 2, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000002"]  # and no remains
