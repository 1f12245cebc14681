import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeLearner

from listopd_ray import checkpoint
from listopd_ray.checkpoint import Checkpoints, CorruptCheckpoint, digests, fetched, staged
from listopd_ray.types import ListopdError


@pytest.fixture
def learner():
    return FakeLearner(events=[])


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    """A directory, and a store that is none."""
    if request.param == "disk":
        return str(tmp_path)
    return f"memory://{tmp_path.name}/run"


def save(root, learner, step, *, keep=2, healthy=False, extra=False, score=None, **state):
    learner.policy_version = step
    marks = {"healthy": healthy, "extra": extra, "score": score}
    Checkpoints(str(root), keep).save(step, learner, state, **marks)


def restore(root, learner):
    return Checkpoints(str(root), 1).restore(learner)


def kept(root):
    """Steps of the checkpoints, once everything else is known to be in order."""
    fs, path = checkpoint._locate(str(root))
    names = sorted(Path(found).name for found in fs.ls(path, detail=False))
    steps = [name for name in names if name.startswith("step-")]
    assert names == ["LATEST", *steps]  # no remains
    assert fs.cat_file(f"{path}/LATEST").decode().strip() == steps[-1]
    return [int(name.removeprefix("step-")) for name in steps]


def test_without_a_checkpoint_there_is_nothing_to_restore(root, tmp_path, learner):
    learner.policy_version = 5
    assert restore(f"{root}/nowhere", learner) is None
    assert restore(root, learner) is None
    assert learner.policy_version == 5


def test_the_newest_checkpoint_comes_back_with_its_state(root, learner):
    for step in (9, 10, 100, 1_000_000, 2_000_000):  # in the order of numbers, not of names
        save(root, learner, step, prompts={"position": step})
    fresh = FakeLearner(events=[])
    assert restore(root, fresh) == {"step": 2_000_000, "prompts": {"position": 2_000_000}}
    assert fresh.policy_version == 2_000_000


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(root, learner, keep):
    for step in (1, 2, 3):
        save(root, learner, step, keep=keep)
    assert kept(root) == [2, 3][-keep:]


def test_the_manifest_has_the_digest_of_every_file(tmp_path, learner):
    save(tmp_path, learner, 1, healthy=True, score=0.5)
    directory = tmp_path / "step-000001"
    manifest = json.loads((directory / "manifest.json").read_text())
    found = digests(directory)
    del found["manifest.json"], found["healthy"]  # the one it is in, and one that may come later
    assert len(manifest.pop("sha256")) == 64  # of the rest
    assert manifest == {"step": 1, "extra": False, "score": 0.5, "files": found}
    assert set(found) == {"fake.json", "state.json"}


@pytest.mark.parametrize(
    ("scores", "steps"),
    [
        ([0.5, 0.9, 0.7, None, 0.8], [2, 5]),
        ([0.9, 0.9, 0.1, 0.1, 0.1], [2, 5]),  # the newer of equals
        ([None, None, None, None, 0.1], [5]),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [5]),
        ([None] * 5, [5]),
    ],
    ids=str,
)
def test_the_best_one_is_kept_beside_the_newest(root, learner, scores, steps):
    for step, score in enumerate(scores, start=1):
        save(root, learner, step, keep=1, score=score)
    assert kept(root) == steps


DAMAGES = {
    "a truncated file": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a flipped byte": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "a missing file": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["fake.json", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_removed_and_the_one_before_used(
    tmp_path, learner, capsys, name, damage
):
    for step in (1, 2, 3):
        save(tmp_path, learner, step, keep=3)
    for step in (2, 3):
        DAMAGES[damage](tmp_path / f"step-{step:06d}" / name)
    fresh = FakeLearner(events=[])
    assert restore(tmp_path, fresh)["step"] == fresh.policy_version == 1
    said = capsys.readouterr().err.splitlines()
    assert [f"step-00000{step}" in line for step, line in zip((3, 2), said, strict=True)]
    assert all(name in line and line.endswith("going on from step-000001") for line in said)
    assert kept(tmp_path) == [1]


def test_where_all_are_damaged_that_is_an_error_of_one_line_and_nothing_is_removed(
    tmp_path, learner
):
    for step in (1, 2):
        save(tmp_path, learner, step)
        (tmp_path / f"step-{step:06d}" / "fake.json").write_text("{")
    fresh = FakeLearner(events=[])
    with pytest.raises(ListopdError, match=r"no checkpoint is intact.*step-000002.*1 of \d+ bytes"):
        restore(tmp_path, fresh)
    assert fresh.policy_version == 0
    assert kept(tmp_path) == [1, 2]


def test_a_file_lost_in_a_store_that_is_no_disk_is_found_out(learner):
    root = "memory://lost/run"
    for step in (1, 2):
        save(root, learner, step)
    fs, path = checkpoint.url_to_fs(root)
    fs.rm(f"{path}/step-000002/fake.json")
    assert restore(root, learner)["step"] == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("died")])
def test_a_save_that_fails_leaves_the_one_before_in_force(root, learner, error):
    save(root, learner, 1)

    class Fails(FakeLearner):
        def save(self, url):
            with staged(url) as directory:
                (directory / "fake.json").write_text("ha")
                raise error

    expected = ListopdError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected) as raised:
        save(root, Fails(events=[]), 2, keep=1)
    if expected is ListopdError:
        assert str(raised.value).endswith("step-000002.tmp: cannot write: No space left on device")
    assert kept(root) == [1]
    fresh = FakeLearner(events=[])
    assert restore(root, fresh)["step"] == fresh.policy_version == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE of Linux")
@pytest.mark.parametrize("limit", [0, 10])
def test_a_full_disk_is_one_clear_line(tmp_path, learner, limit):
    """The system itself refuses to write on, whoever writes."""
    save(tmp_path, learner, 1)
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from fakes import FakeLearner
from listopd_ray.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    Checkpoints({str(tmp_path)!r}, 1).save(2, FakeLearner([]), {{}}, healthy=False)
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"ListopdError: {tmp_path}/step-000002.tmp: cannot write: File too large"
    assert kept(tmp_path) == [1]


def test_where_the_new_one_cannot_take_the_place_of_the_old_that_stays(root, learner, monkeypatch):
    save(root, learner, 1, attempt=1)
    move = Checkpoints._move

    def fail(self, source, target):
        if (source, target) == ("step-000001.tmp", "step-000001"):
            raise OSError(5, "Input/output error")
        move(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_move", fail)
        with pytest.raises(ListopdError, match="Input/output error"):
            save(root, learner, 1, attempt=2)
    assert restore(root, learner)["attempt"] == 1


def test_a_learner_that_writes_where_the_driver_does_not_see_it_is_one_clear_line(
    tmp_path, monkeypatch
):
    """As where its machine has a disk of its own."""
    monkeypatch.setattr(checkpoint, "SHOWN_AFTER_S", 0.0)

    class Elsewhere(FakeLearner):
        def save(self, url):
            return {"student/model.safetensors": {"sha256": "", "bytes": 1}}

    with pytest.raises(ListopdError, match=rf"^{tmp_path}: not shared: "):
        save(tmp_path, Elsewhere([]), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_shows_late_what_another_machine_wrote_is_waited_for(tmp_path, monkeypatch):
    exists, calls = checkpoint.LocalFileSystem.exists, []

    def later(self, path, **options):
        calls.append(path)
        return len(calls) > 2 and exists(self, path, **options)

    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: None)
    monkeypatch.setattr(checkpoint.LocalFileSystem, "exists", later)
    save(tmp_path, FakeLearner([]), 1)
    assert kept(tmp_path) == [1]


def test_any_bit_of_a_manifest_that_flips_is_noticed(tmp_path, learner):
    save(tmp_path, learner, 1)
    save(tmp_path, learner, 2, score=0.5)
    file = tmp_path / "step-000002" / "manifest.json"
    content = file.read_bytes()
    checkpoints = Checkpoints(str(tmp_path), 1)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        if bytes(damaged).split() == content.split():
            continue  # white space
        file.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint):
            checkpoints._manifest("step-000002")


@pytest.mark.parametrize("what", ["directory", "file"])
def test_other_things_in_the_place_of_a_checkpoint_are_passed_over(tmp_path, learner, what):
    save(tmp_path, learner, 1)
    if what == "file":
        (tmp_path / "step-000009").write_text("?")
    else:
        (tmp_path / "step-000009" / "manifest.json").mkdir(parents=True)
    assert restore(tmp_path, learner)["step"] == 1


def test_a_score_that_is_no_number_is_not_the_best(root, learner):
    for step, score in enumerate([0.9, float("nan"), 0.1, 0.05], start=1):
        save(root, learner, step, keep=1, score=score)
    assert kept(root) == [1, 4]


@pytest.mark.parametrize("name", ["a::b", "~", "[1]"])
def test_a_directory_may_have_any_name(tmp_path, learner, name):
    save(tmp_path / name, learner, 1)
    assert kept(tmp_path / name) == [1]


@pytest.mark.parametrize("url", ["s3://bucket/x", "foo://x"])
def test_a_url_that_nothing_here_opens_is_one_line(url):
    with pytest.raises(ListopdError, match=rf"checkpoint\.path: {url}: "):
        Checkpoints(url, 1)


def test_remains_of_a_process_that_was_killed_are_removed(root, learner):
    save(root, learner, 1)
    fs, path = checkpoint.url_to_fs(root)
    for name in ("step-000002.tmp", "step-000001.old.tmp"):
        fs.makedirs(f"{path}/{name}", exist_ok=True)
        fs.pipe_file(f"{path}/{name}/half", b"written")
    assert restore(root, learner)["step"] == 1
    save(root, learner, 2)
    assert kept(root) == [1, 2]


def test_a_step_saved_again_replaces_the_first(root, learner):
    save(root, learner, 2, attempt=1)
    save(root, learner, 2, attempt=2)
    assert restore(root, learner)["attempt"] == 2
    assert kept(root) == [2]


@pytest.mark.parametrize(
    ("healthy", "steps"),
    [
        ([0], [0, 4, 5]),  # outside the newest two, and kept
        ([0, 1, 2], [2, 4, 5]),  # of the healthy ones only the newest
        ([0, 4], [4, 5]),
        ([0, 1, 2, 3, 4, 5], [4, 5]),
        ([], [4, 5]),
    ],
    ids=str,
)
def test_the_newest_healthy_one_is_kept_beside_the_newest(root, learner, healthy, steps):
    for step in range(6):
        save(root, learner, step, healthy=step in healthy)
        if healthy:
            assert max(s for s in healthy if s <= step) in kept(root)  # at any time
    assert kept(root) == steps


def test_a_checkpoint_may_turn_out_healthy_later(root, learner):
    for step in range(4):
        save(root, learner, step, keep=2, healthy=step == 0)
        Checkpoints(root, 2).mark_healthy(step - 1)  # of none before the first
    assert kept(root) == [1, 2, 3]
    Checkpoints(root, 2).mark_healthy(0)  # gone already, and not to come back
    Checkpoints(root, 2).drop_unhealthy()
    assert kept(root) == [1, 2]


def test_an_extra_one_takes_no_others_place_and_is_nothing_to_roll_back_to(root, learner):
    for step in (1, 2):
        save(root, learner, step, healthy=step == 1)
    save(root, learner, 3, extra=True, score=0.9)
    save(root, learner, 4, extra=True)
    assert kept(root) == [1, 2, 4]
    Checkpoints(str(root), 2).mark_healthy(4)
    assert restore(root, FakeLearner(events=[]))["step"] == 4
    Checkpoints(str(root), 2).drop_unhealthy()
    assert kept(root) == [1]


@pytest.mark.parametrize(
    ("healthy", "left"),
    [([1], [1]), ([1, 2, 3], [1, 2, 3]), ([2], [1, 2]), ([], [1, 2, 3]), ([1, 3], [1, 2, 3])],
    ids=str,
)
def test_what_came_after_the_newest_healthy_one_can_be_dropped(root, learner, healthy, left):
    for step in (1, 2, 3):
        save(root, learner, step, keep=3, healthy=step in healthy)
    Checkpoints(root, 3).drop_unhealthy()
    assert kept(root) == left
    fresh = FakeLearner(events=[])
    assert restore(root, fresh)["step"] == fresh.policy_version == left[-1]


def test_a_process_that_ends_while_it_removes_leaves_only_whole_checkpoints(
    tmp_path, learner, monkeypatch
):
    for step in (1, 2, 3):
        save(tmp_path, learner, step, keep=3, healthy=step == 1)

    def remove_half(path, *_, **__):
        (Path(path) / "state.json").unlink()
        raise KeyboardInterrupt

    checkpoints = Checkpoints(str(tmp_path), 3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.drop_unhealthy()  # the newest goes first: what is left was once a state
        assert restore(tmp_path, learner)["step"] == 2
        with pytest.raises(KeyboardInterrupt):
            checkpoints.drop_unhealthy()
        assert restore(tmp_path, learner)["step"] == 1
    save(tmp_path, learner, 2, keep=1)
    assert kept(tmp_path) == [1, 2]


def test_staged_files_come_back_whole_or_not_at_all(root, tmp_path):
    url = f"{root}/place"
    with staged(url) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_bytes(b"abc")
        files = digests(directory)
    assert files == {"sub/a": {"sha256": files["sub/a"]["sha256"], "bytes": 3}}
    with fetched(url, files) as directory:
        assert (directory / "sub" / "a").read_bytes() == b"abc"
    files["sub/a"]["sha256"] = "0" * 64
    with (
        pytest.raises(CorruptCheckpoint, match=r"sub/a is not what was written"),
        fetched(url, files),
    ):
        pass
