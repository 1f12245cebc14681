"""Weights as tensors, as files and as adapters, without Ray and vLLM."""

import dataclasses
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from listopd_ray.config import (
    Config,
    LearnerConfig,
    LoraConfig,
    RolloutConfig,
    load_config,
    sync_directory,
)
from listopd_ray.roles import weights as weights_module
from listopd_ray.roles.batching import collate
from listopd_ray.roles.publisher import Publisher
from listopd_ray.roles.ranks import Ranks
from listopd_ray.roles.rollout import RolloutWorker
from listopd_ray.roles.student import Student
from listopd_ray.roles.weights import torch_tensors
from listopd_ray.types import ListopdError

RANK = 4


@pytest.fixture
def make_student(student_path):
    """The student, with an adapter whose product is not zero, as after some updates."""

    def make(dtype="float32", rank=RANK, **lora):
        config = Config(learner=LearnerConfig(dtype=dtype), lora=LoraConfig(rank=rank, **lora))
        student = Student(str(student_path), config, Ranks())
        move(student)
        return student

    return make


def move(student, scale=0.1):
    """As an update would: the adapter alone."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * scale)


@pytest.fixture
def make_publisher(tmp_path, canary_ids):
    def make(student, method):
        publisher = Publisher(student, method, tmp_path / "sync")

        @torch.no_grad()
        def publish(version):
            since = time.perf_counter()
            batch = collate([canary_ids[:1]], [canary_ids[1:]])
            canary = student.logprobs(batch, batch.token_ids[:, None])[:, 0].numpy()
            return publisher.publish(version, canary_ids, canary, since=since)

        return SimpleNamespace(publish=publish, close=publisher.close)

    return make


@pytest.fixture
def make_worker(student_path):
    def make(**options):
        return RolloutWorker(
            RolloutConfig(backend="hf"),
            model_path=str(student_path),
            dtype="float32",
            device="cpu",
            max_num_seqs=8,
            end_ids=(0,),
            max_prompt_tokens=64,
            max_new_tokens=4,
            **{"tolerance": 1e-4, "adapter_rank": 0, **options},
        )

    return make


def versions_on_disk(tmp_path):
    directory = tmp_path / "sync"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_published_base_tensors_are_bit_identical_after_20_syncs(make_student, make_publisher):
    """`merge_adapter` and `unmerge_adapter` would not do: in bfloat16 they drift."""
    student = make_student("bfloat16")
    publisher = make_publisher(student, "object_store")
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    for version in range(20):
        publisher.publish(version)
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "not the output head"),
        ({"target_modules": ["embed_tokens"]}, "otherwise than a matrix by"),
        ({"peft": {"use_dora": True}}, "otherwise than a matrix by"),
        ({"peft": {"lora_bias": True}}, "otherwise than a matrix by"),
        ({"peft": {"init_lora_weights": "pissa"}}, "must start with B = 0"),
        ({"peft": {"init_lora_weights": "olora"}}, "must start with B = 0"),
        ({"peft": {"init_lora_weights": False}}, "must start with B = 0"),
        ({"target_modules": ["q_proj"], "peft": {"modules_to_save": ["mlp"]}}, "its name is not"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_at_the_start(make_student, options, message):
    with pytest.raises(ListopdError, match=message):
        make_student(**options)


def test_files_hold_what_the_object_store_would(make_student, make_publisher):
    for dtype in ("float32", "bfloat16"):
        student = make_student(dtype)
        expected = dict(torch_tensors(make_publisher(student, "object_store").publish(0)))
        weights = make_publisher(student, "directory").publish(0)
        found = dict(torch_tensors(weights))
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert weights.num_bytes == sum(weights.files.values())
        assert weights.num_bytes > sum(tensor.nbytes for tensor in expected.values())


def test_an_adapters_files_are_the_trained_tensors_and_little_else(make_student, make_publisher):
    student = make_student()
    weights = make_publisher(student, "adapter").publish(0)
    tensors = load_file(f"{weights.path}/adapter_model.safetensors")
    trained = student.trained()
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in trained)
    full = make_publisher(student, "object_store").publish(0).num_bytes
    assert weights.num_bytes < 0.5 * full


def test_a_version_goes_once_the_next_is_loaded_and_none_is_written_twice(
    make_student, make_publisher, tmp_path
):
    publisher = make_publisher(make_student(rank=0), "directory")
    paths = []
    for version in (0, 1, 2, 1):  # a roll-back makes another version 1
        paths.append(publisher.publish(version).path)
        # The one before may still be wanted, by a worker that takes another's place.
        assert versions_on_disk(tmp_path) == sorted(p.split("/")[-1] for p in paths[-2:])
    assert len(set(paths)) == 4
    publisher.close()
    assert versions_on_disk(tmp_path) == []


def test_what_a_process_before_has_left_is_removed(make_student, make_publisher, tmp_path):
    make_publisher(make_student(rank=0), "directory").publish(7)
    (tmp_path / "sync" / "000002-v8.tmp").mkdir()
    make_publisher(make_student(rank=0), "object_store")
    assert versions_on_disk(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_one_line(make_student, make_publisher, tmp_path):
    publisher = make_publisher(make_student(rank=0), "directory")
    (tmp_path / "sync").write_text("a file")
    with pytest.raises(ListopdError, match=r"sync\.path: .*sync/000001-v0: Not a directory"):
        publisher.publish(0)


@pytest.mark.parametrize("method", ["object_store", "directory", "adapter"])
def test_a_worker_serves_the_learners_policy_whatever_the_method(
    make_student, make_publisher, make_worker, method
):
    student = make_student()
    publisher, worker = make_publisher(student, method), make_worker(adapter_rank=RANK)
    for version in range(3):
        loaded = worker.load_weights(publisher.publish(version))
        assert loaded.canary_max < 1e-5
        assert loaded.num_bytes > 0
        move(student)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda path: path.joinpath("model.safetensors").unlink(),
            r"model\.safetensors: not there",
        ),
        (
            lambda path: path.joinpath("model.safetensors").write_bytes(b"half"),
            r"4 bytes of \d+ on this machine",
        ),
    ],
)
def test_files_that_are_missing_or_half_written_are_one_line(
    make_student, make_publisher, make_worker, monkeypatch, tmp_path, break_it, message
):
    monkeypatch.setattr(weights_module, "FILES_TIMEOUT_S", 0.2)
    weights = make_publisher(make_student(rank=0), "directory").publish(3)
    (directory,) = (tmp_path / "sync").iterdir()
    break_it(directory)
    with pytest.raises(ListopdError, match=message) as error:
        make_worker().load_weights(weights)
    assert "sync.path must be storage that all machines share" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_come_late_are_waited_for(
    make_student, make_publisher, make_worker, monkeypatch, tmp_path
):
    weights = make_publisher(make_student(rank=0), "directory").publish(3)
    (directory,) = (tmp_path / "sync").iterdir()
    directory.rename(tmp_path / "not yet")
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            (tmp_path / "not yet").rename(directory)

    monkeypatch.setattr(weights_module.time, "sleep", nap)
    assert make_worker().load_weights(weights).canary_max < 1e-5
    assert len(naps) == 3


def test_an_adapter_of_another_rank_is_one_line(make_student, make_publisher, make_worker):
    weights = make_publisher(make_student(rank=RANK * 2), "adapter").publish(0)
    with pytest.raises(ListopdError, match="an adapter of rank 8, the engine's are of rank 4"):
        make_worker(adapter_rank=RANK).load_weights(weights)


def test_the_canary_sees_an_adapter_of_another_scale(make_student, make_publisher, make_worker):
    student = make_student()
    publisher, worker = make_publisher(student, "adapter"), make_worker(adapter_rank=RANK)
    assert worker.load_weights(publisher.publish(0)).canary_max < 1e-5
    good = publisher.publish(1)
    move(student)
    stale = dataclasses.replace(publisher.publish(2), path=good.path, files=good.files)
    with pytest.raises(ListopdError, match="canary"):
        worker.load_weights(stale)


def test_bytes_of_arrays_are_counted(make_student, make_publisher):
    weights = make_publisher(make_student(), "object_store").publish(0)
    head, embedding = (
        weights.tensors[name] for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert head is embedding, "pickled once"
    total = sum(array.nbytes for array in weights.tensors.values()) - head.nbytes
    assert weights.num_bytes == total
    assert total < len(pickle.dumps(weights)) < total + 10_000
    assert 0 < weights.seconds < 60


def test_adapter_sync_needs_an_adapter():
    with pytest.raises(ListopdError, match=r"sync\.method: adapter needs lora\.rank ≥ 1"):
        load_config(Config, ["sync.method=adapter"])
    load_config(Config, ["sync.method=adapter", "lora.rank=8"])


def test_an_engine_of_several_processes_needs_files():
    engine = "rollout.engine={tensor_parallel_size: 2}"
    with pytest.raises(ListopdError, match=r"sync\.method: .*: directory does"):
        load_config(Config, [engine])
    load_config(Config, [engine, "sync.method=directory"])
    load_config(Config, ["rollout.engine={tensor_parallel_size: 1}"])


def test_every_run_has_a_sync_directory_of_its_own():
    def directory(*arguments):
        return sync_directory(load_config(Config, list(arguments)))

    assert directory("out=/a", "name=b").as_posix() == "/a/b/sync"
    shared = [directory(f"out={out}", "name=b", "sync.path=/dev/shm") for out in ("/a", "/c")]
    assert shared[0] != shared[1]
    assert all(path.parent.as_posix() == "/dev/shm" for path in shared)
