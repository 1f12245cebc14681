"""Weights as tensors, as files and as adapters, without Ray and vLLM."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from listopd_ray.config import Config, RolloutConfig, load_config, sync_directory
from listopd_ray.models import load_model
from listopd_ray.roles import weights as weights_module
from listopd_ray.roles.adapters import check_names, merged_tensors
from listopd_ray.roles.batching import collate, completion_logprobs, gather
from listopd_ray.roles.publisher import Publisher
from listopd_ray.roles.rollout import RolloutWorker
from listopd_ray.roles.weights import export_tensors, to_arrays, torch_tensors
from listopd_ray.types import ListopdError

RANK = 4


@pytest.fixture
def make_peft(student_path):
    """The student with an adapter whose product is not zero, as after some updates."""

    def make(dtype="float32", **options):
        model = load_model(student_path, dtype=dtype)
        settings = {"r": RANK, "lora_alpha": 8, "target_modules": "all-linear", **options}
        peft = get_peft_model(model, LoraConfig(**settings)).eval()
        move(peft)
        return peft

    return make


def move(peft, scale=0.1):
    """As an update would: the adapter alone."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * scale)


def logprobs(model, token_ids):
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    batch = collate([token_ids[:1]], [token_ids[1:]])
    with torch.inference_mode():
        return gather(completion_logprobs(model, batch), batch.token_ids).numpy()


@pytest.fixture
def make_publisher(tmp_path, canary_ids):
    def make(model, method, dtype="float32"):
        publisher = Publisher(model, method, tmp_path / "sync", dtype)

        def publish(version):
            canary = logprobs(model, canary_ids)
            return publisher.publish(version, canary_ids, canary, since=time.perf_counter())

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
            end_ids=(0,),
            max_prompt_tokens=64,
            max_new_tokens=4,
            **{"tolerance": 1e-4, "adapter_rank": 0, **options},
        )

    return make


def versions_on_disk(tmp_path):
    directory = tmp_path / "sync"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_merged_tensors_are_those_that_peft_merges(make_peft, student_path):
    peft = make_peft()
    merged = export_tensors(peft, torch.float32)
    expected = peft.merge_and_unload().state_dict()
    assert set(merged) == set(expected) == set(load_model(student_path).state_dict())
    moved = 0
    for name, tensor in load_model(student_path).state_dict().items():
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-7)
        moved += not torch.equal(merged[name], tensor)
    assert moved == 7 * 2  # projections of the two layers


def test_merging_in_bfloat16_sums_in_float32_and_rounds_once(make_peft):
    peft = make_peft("bfloat16")
    merged = dict(merged_tensors(peft))
    name = "model.layers.0.mlp.up_proj"
    layer = peft.get_base_model().get_submodule(name)
    up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    exact = layer.base_layer.weight.double() + 2.0 * up @ down
    torch.testing.assert_close(merged[f"{name}.weight"].double(), exact, rtol=1e-6, atol=1e-7)
    sent = export_tensors(peft, torch.bfloat16)[f"{name}.weight"]
    assert torch.equal(sent, merged[f"{name}.weight"].bfloat16())


def test_published_base_tensors_are_bit_identical_after_20_syncs(make_peft, make_publisher):
    """`merge_adapter` and `unmerge_adapter` would not do: in bfloat16 they drift."""
    peft = make_peft("bfloat16")
    publisher = make_publisher(peft, "object_store", "bfloat16")
    before = {name: tensor.clone() for name, tensor in peft.state_dict().items()}
    for version in range(20):
        publisher.publish(version)
    for name, tensor in peft.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_modules_that_are_trained_whole_keep_their_names(make_peft):
    peft = make_peft(target_modules=["q_proj"], modules_to_save=["mlp"])
    check_names(peft)
    name = "model.layers.1.mlp.up_proj"
    copy = peft.get_base_model().model.layers[1].mlp.modules_to_save["default"].up_proj
    with torch.no_grad():
        copy.weight.add_(1.0)
    assert torch.equal(export_tensors(peft, torch.float32)[f"{name}.weight"], copy.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "embedding and head are tied"),
        ({"target_modules": ["embed_tokens"]}, "embedding and head are tied"),
        ({"use_dora": True}, "otherwise than by W"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "otherwise than by W"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_at_the_start(
    make_peft, make_publisher, options, message
):
    with pytest.raises(ListopdError, match=message):
        make_publisher(make_peft(**options), "object_store")


def test_files_hold_what_the_object_store_would(make_peft, make_publisher):
    for dtype in ("float32", "bfloat16"):
        peft = make_peft(dtype)
        expected = dict(torch_tensors(make_publisher(peft, "object_store", dtype).publish(0)))
        weights = make_publisher(peft, "directory", dtype).publish(0)
        found = dict(torch_tensors(weights))
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert weights.num_bytes == sum(weights.files.values())
        assert weights.num_bytes > sum(tensor.nbytes for tensor in expected.values())


def test_an_adapters_files_are_the_trained_tensors_and_little_else(make_peft, make_publisher):
    peft = make_peft()
    weights = make_publisher(peft, "adapter").publish(0)
    tensors = load_file(f"{weights.path}/adapter_model.safetensors")
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in trained)
    full = make_publisher(peft, "object_store").publish(0).num_bytes
    assert weights.num_bytes < 0.5 * full


def test_a_version_goes_once_the_next_is_loaded_and_none_is_written_twice(
    student_model, make_publisher, tmp_path
):
    publisher = make_publisher(student_model, "directory")
    paths = []
    for version in (0, 1, 2, 1):  # a roll-back makes another version 1
        paths.append(publisher.publish(version).path)
        # The one before may still be wanted, by a worker that takes another's place.
        assert versions_on_disk(tmp_path) == sorted(p.split("/")[-1] for p in paths[-2:])
    assert len(set(paths)) == 4
    publisher.close()
    assert versions_on_disk(tmp_path) == []


def test_what_a_process_before_has_left_is_removed(student_model, make_publisher, tmp_path):
    make_publisher(student_model, "directory").publish(7)
    (tmp_path / "sync" / "000002-v8.tmp").mkdir()
    make_publisher(student_model, "object_store")
    assert versions_on_disk(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_one_line(student_model, tmp_path, canary_ids):
    (tmp_path / "sync").write_text("a file")
    publisher = Publisher(student_model, "directory", tmp_path / "sync", "float32")
    with pytest.raises(ListopdError, match=r"sync\.path: .*sync/000001-v0: Not a directory"):
        publisher.publish(0, canary_ids, canary_ids[1:], since=0.0)


@pytest.mark.parametrize("method", ["object_store", "directory", "adapter"])
def test_a_worker_serves_the_learners_policy_whatever_the_method(
    make_peft, make_publisher, make_worker, method
):
    peft = make_peft()
    publisher, worker = make_publisher(peft, method), make_worker(adapter_rank=RANK)
    for version in range(3):
        loaded = worker.load_weights(publisher.publish(version))
        assert loaded.canary_max < 1e-5
        assert loaded.num_bytes > 0
        move(peft)


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
    student_model, make_publisher, make_worker, monkeypatch, tmp_path, break_it, message
):
    monkeypatch.setattr(weights_module, "FILES_TIMEOUT_S", 0.2)
    weights = make_publisher(student_model, "directory").publish(3)
    (directory,) = (tmp_path / "sync").iterdir()
    break_it(directory)
    with pytest.raises(ListopdError, match=message) as error:
        make_worker().load_weights(weights)
    assert "sync.path must be storage that all machines share" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_come_late_are_waited_for(
    student_model, make_publisher, make_worker, monkeypatch, tmp_path
):
    weights = make_publisher(student_model, "directory").publish(3)
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


def test_an_adapter_of_another_rank_is_one_line(make_peft, make_publisher, make_worker):
    weights = make_publisher(make_peft(r=RANK * 2), "adapter").publish(0)
    with pytest.raises(ListopdError, match="an adapter of rank 8, the engine's are of rank 4"):
        make_worker(adapter_rank=RANK).load_weights(weights)


def test_the_canary_sees_an_adapter_of_another_scale(make_peft, make_publisher, make_worker):
    peft = make_peft()
    publisher, worker = make_publisher(peft, "adapter"), make_worker(adapter_rank=RANK)
    assert worker.load_weights(publisher.publish(0)).canary_max < 1e-5
    good = publisher.publish(1)
    move(peft)
    stale = dataclasses.replace(publisher.publish(2), path=good.path, files=good.files)
    with pytest.raises(ListopdError, match="canary"):
        worker.load_weights(stale)


def test_bytes_of_arrays_are_counted(student_model, make_publisher):
    weights = make_publisher(student_model, "object_store").publish(0)
    arrays = to_arrays(export_tensors(student_model, torch.float32)).values()
    assert weights.num_bytes == sum(array.nbytes for array in arrays)
    assert np.isfinite(weights.seconds)
    assert weights.seconds > 0


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
