"""vLLM inspects a model's class in a process of its own, once, and keeps what it found: here."""

import os
from pathlib import Path

from vllm.model_executor.models.registry import ModelRegistry

kept = Path(os.environ["VLLM_CACHE_ROOT"], "modelinfos")
for name in ("Qwen3ForCausalLM", "LlamaForCausalLM"):
    ModelRegistry.models[name].inspect_model_cls()
    assert list(kept.glob(f"*{name}.json")), name
