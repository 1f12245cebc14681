"""Model directories on machines that do and that do not see the driver's disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import ray

from listopd_ray import model_files as module
from listopd_ray.model_files import ModelFiles, model_files
from listopd_ray.types import ListopdError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (directory / "config.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module, "BLOCK", 100)
    return directory


@pytest.fixture
def elsewhere(
    ray_cluster: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ModelFiles:
    """As another machine has it: under the path that it is known by lies something else."""
    there = shutil.copytree(model, tmp_path / "there")
    files = model_files(there)
    monkeypatch.setattr(module, "this_node", lambda: "another machine")
    monkeypatch.setattr(module, "_listing", lambda path: ())
    return files


def test_its_own_machine_opens_the_directory_itself(ray_cluster: None, model: Path) -> None:
    assert os.fspath(model_files(model)) == str(model)


def test_shared_storage_is_read_where_it_is(
    ray_cluster: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = model_files(model)
    monkeypatch.setattr(module, "this_node", lambda: "another machine")
    assert os.fspath(files) == str(model)


def test_another_machine_gets_one_copy_of_what_a_model_is_made_of(
    elsewhere: ModelFiles, model: Path
) -> None:
    copy = Path(elsewhere)
    assert {file.name for file in copy.iterdir()} == {"model.safetensors", "config.json"}
    for file in copy.iterdir():
        assert file.read_bytes() == (model / file.name).read_bytes()
    before = copy.stat()
    assert Path(elsewhere) == copy
    assert copy.stat() == before
    assert copy.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", [b"shorter", bytes(1024), bytes(5000), None])
def test_a_model_that_changes_meanwhile_is_not_half_copied(
    elsewhere: ModelFiles, content: bytes | None
) -> None:
    file = Path(elsewhere.path, "model.safetensors")
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ListopdError, match="has changed since the start"):
        os.fspath(elsewhere)
    (root,) = Path(module.tempfile.gettempdir()).iterdir()
    assert [file.suffix for file in root.iterdir()] == [".lock"]


def test_what_another_user_has_put_there_is_not_taken(
    elsewhere: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "getuid", lambda: 12345)
    with pytest.raises(ListopdError, match="open to other users"):
        os.fspath(elsewhere)


def test_it_travels_and_is_known_by_what_it_is(ray_cluster: None, model: Path) -> None:
    """Teachers keep bases by it."""
    same = ray.get(ray.put(model_files(model)))
    assert same == model_files(model)
    assert len({same, model_files(model)}) == 1
    (model / "config.json").write_text("{ }")
    assert model_files(model) != same
