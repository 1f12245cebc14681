import pytest

from listopd_ray.config import Config, load_config, max_num_seqs
from listopd_ray.roles.vllm_engine import kv_cache_mib

TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
QWEN = {  # Qwen3-1.7B
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], 64),
        (["group_size=3"], 192),
        (["group_size=3", "rollout.num_workers=2"], 96),
        (["num_prompts=65", "rollout.num_workers=2"], 33),  # the larger share
        (["num_prompts=1024"], 256),
        (["num_prompts=1024", "rollout.max_num_seqs=512"], 512),
    ],
)
def test_a_worker_decodes_its_share_of_an_update_at_once(settings, expected):
    assert max_num_seqs(load_config(Config, settings)) == expected


@pytest.mark.parametrize(
    ("shape", "dtype", "num_seqs", "num_tokens", "engine", "mib"),
    [
        # 1 KiB a token in float32: keys and values, 2 layers, 2 heads of 32. 65 blocks of 128.
        (TINY, "float32", 64, 80, {}, 9),
        (TINY, "bfloat16", 64, 80, {}, 5),
        (TINY, "float32", 64, 129, {}, 17),  # two blocks a sequence
        (TINY, "float32", 64, 80, {"block_size": 16}, 6),  # 321 blocks of 16
        # 112 KiB a token in bfloat16; 1025 blocks of 128.
        (QWEN, "bfloat16", 256, 512, {}, 14350),
        (QWEN, "bfloat16", 256, 512, {"tensor_parallel_size": 2}, 7175),
        (QWEN, "bfloat16", 256, 512, {"tensor_parallel_size": 16}, 1794),  # one head at least
    ],
)
def test_the_cache_holds_every_sequence_at_its_full_length(
    shape, dtype, num_seqs, num_tokens, engine, mib
):
    assert kv_cache_mib(shape, dtype, num_seqs, num_tokens, engine) == mib
