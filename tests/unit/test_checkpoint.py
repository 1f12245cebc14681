import pytest
from fakes import FakeLearner

from listopd_ray.checkpoint import restore_latest, save_checkpoint


@pytest.fixture
def learner():
    return FakeLearner(events=[])


def save(root, learner, step, keep=2, **state):
    learner.policy_version = step
    save_checkpoint(root, step, learner, state, keep=keep)


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
