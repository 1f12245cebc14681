import pytest

from listopd_ray.cluster import _env
from listopd_ray.config import Config, load_config
from listopd_ray.task.synthetic import SyntheticConfig, write_synthetic
from listopd_ray.warmstart import _cache_key


@pytest.fixture(scope="module")
def key_of(tmp_path_factory):
    """A function: the key of the student's warm start under some settings."""
    data = tmp_path_factory.mktemp("data") / "synthetic"
    write_synthetic(SyntheticConfig(out=str(data), num_train=20, num_eval=5))

    def key(*settings):
        config = load_config(Config, [f"data.path={data}", *settings])
        return _cache_key(config, config.student)

    return key


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "num_threads=2",
        "warmstart_workers=2",
        "learner.autocast=true",
        "student.warmstart.lr=1e-4",
        "student.warmstart.prompt_loss_weight=0.5",
        "student.num_layers=3",
        "tokenizer.vocab_size=300",
    ],
)
def test_what_changes_a_warm_start_changes_its_key(key_of, setting):
    assert key_of(setting) != key_of()


@pytest.mark.parametrize(
    "setting", ["lam=2", "clip=5", "lr=1e-4", "teacher.warmstart.lr=1e-4", "name=other"]
)
def test_what_comes_after_a_warm_start_leaves_its_key(key_of, setting):
    assert key_of(setting) == key_of()


def test_threads_are_the_actors_environment():
    assert _env(Config(num_threads=2), "hf")["OMP_NUM_THREADS"] == "2"
    assert _env(Config(num_threads=2), "vllm")["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in _env(Config(), "hf")  # Ray's own
