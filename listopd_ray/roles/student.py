"""The student in training: all of its weights or a low-rank adapter, in one piece or in shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import Parameter
from transformers import PreTrainedModel

from listopd_ray.config import Config, LearnerConfig
from listopd_ray.models import load_model, load_tokenizer
from listopd_ray.roles.batching import Batch, can_share_prompts, hidden_states
from listopd_ray.roles.head import token_logprobs
from listopd_ray.roles.ranks import Ranks, fill, whole
from listopd_ray.types import ListopdError, StrPath

ADAPTER = "default"  # PEFT's name for the only one
ADAPTER_FILE = "adapter_model.safetensors"  # in a PEFT directory


class Student:
    def __init__(self, path: StrPath, config: Config, ranks: Ranks) -> None:
        learner = self._config = config.learner
        self._device, self._ranks = config.device, ranks
        self.tokenizer = load_tokenizer(path)
        self.model = load_model(path, dtype=learner.dtype, device=config.device)
        self.dtype_name = learner.dtype
        self._peft: PeftModel | None = None
        if config.lora.rank:
            torch.manual_seed(config.seed)  # every rank draws the same adapter
            self._peft = _with_adapter(self.model, config)
        _set_mode(self.model, learner)
        self.can_share_prompts = can_share_prompts(self.model)
        self._forward = _Forward(self.model, learner.logits_mib)
        if learner.sharding == "full" and ranks.count > 1:
            _shard(self._forward, config.device, ranks.count, learner)

    @property
    def has_adapter(self) -> bool:
        return self._peft is not None

    def trained(self) -> list[Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def logprobs(self, batch: Batch, token_ids: torch.Tensor) -> torch.Tensor:
        """[N, S] float32 of the tokens `token_ids` [N, S] where the batch's completion tokens
        are due."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._config.autocast):
            return self._forward(batch, token_ids)

    @torch.no_grad()
    def base_logprobs(self, batch: Batch, token_ids: torch.Tensor) -> torch.Tensor:
        """As `logprobs`, of the student as it was before training: without its adapter."""
        assert self._peft is not None
        with self._peft.disable_adapter():
            return self.logprobs(batch, token_ids)

    def finish_gradients(self) -> None:
        """Once all micro-batches are through: the gradient of the whole update in every rank."""
        if self._config.sharding == "none":  # else the backward pass has done it
            self._ranks.sum_gradients(self.trained())

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its checkpoint's name, an adapter added to copies of those it is for.

        A tied output head comes under its own name too: vLLM's CPU backend keeps a packed copy of
        the head which an update of the embedding alone leaves stale, without an error. Where the
        weights are sharded every rank has to run through them.
        """
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LoraLayer)}
        head = self.model.get_output_embeddings().weight
        for name, parameter in self.model.named_parameters():
            layer, is_wrapped, _ = name.partition(".base_layer.weight")
            if ".lora_" in name:
                continue
            tensor = whole(parameter.detach())
            if is_wrapped:
                tensor = _merged(tensor, layers[layer])
            yield name.replace(".base_layer.", "."), tensor
            if parameter is head and self.model.config.tie_word_embeddings:
                yield "lm_head.weight", tensor

    def weights(self) -> dict[str, torch.Tensor]:
        """The student's checkpoint, an adapter merged, on the CPU; in rank 0 alone."""
        tensors = self._ranks.collected(self.tensors())
        if self.model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        return tensors

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors under PEFT's names, on the CPU; in rank 0 alone."""
        parameters = self._adapter_parameters()
        return self._ranks.collected((name, whole(p.detach())) for name, p in parameters)

    def state(self) -> dict[str, torch.Tensor]:
        """What training changes: `adapter`, or `weights`."""
        return self.adapter() if self.has_adapter else self.weights()

    def write(self, directory: Path, weights: dict[str, torch.Tensor]) -> None:
        """`weights` as a Hugging Face directory."""
        self.model.save_pretrained(directory, state_dict=weights)
        self.tokenizer.save_pretrained(directory)

    def write_adapter(self, directory: Path, adapter: dict[str, torch.Tensor]) -> None:
        """`adapter` as a PEFT directory."""
        assert self._peft is not None  # whose `save_pretrained` takes twenty times as long
        directory.mkdir(parents=True, exist_ok=True)
        save_file(adapter, directory / ADAPTER_FILE)
        self._peft.peft_config[ADAPTER].save_pretrained(str(directory))

    def write_state(self, directory: Path, state: dict[str, torch.Tensor]) -> None:
        if self.has_adapter:
            self.write_adapter(directory / "adapter", state)
        else:
            self.write(directory / "student", state)

    def restore(self, directory: Path) -> None:
        """What `write_state` wrote, in place; raises ListopdError where that is no model."""
        if self.has_adapter:
            state = load_peft_weights(str(directory / "adapter"), device="cpu")
            for name, parameter in self._adapter_parameters():
                fill(parameter, state[name])
        else:
            state = load_model(directory / "student", dtype=self._config.dtype).state_dict()
            for name, parameter in self.model.named_parameters():
                fill(parameter, state[name])

    def _adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        assert self._peft is not None
        for name, parameter in self._peft.named_parameters():
            if ".lora_" in name:
                yield _peft_name(name), parameter


class _Forward(torch.nn.Module):
    """Body and head in one call: where weights are sharded they are whole within it."""

    def __init__(self, model: PreTrainedModel, logits_mib: int) -> None:
        super().__init__()
        self.model = model
        self._logits_mib = logits_mib

    def forward(self, batch: Batch, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states(self.model, batch)
        head = self.model.get_output_embeddings()
        return token_logprobs(hidden, head.weight, token_ids, self._logits_mib)


def _peft_name(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _with_adapter(model: PreTrainedModel, config: Config) -> PeftModel:
    lora = config.lora
    names = {name for name, _ in model.named_parameters()}
    try:
        adapter = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.target_modules) or "all-linear",
            task_type="CAUSAL_LM",
            **lora.peft,
        )
        peft = get_peft_model(model, adapter)
    except (TypeError, ValueError) as error:
        raise ListopdError(f"lora: {' '.join(str(error).split())}") from None
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise ListopdError("lora.target_modules: not the output head")
    for name, module in model.named_modules():  # what `_merged` can merge
        if isinstance(module, LoraLayer) and not _is_plain(module):
            raise ListopdError(f"lora: {name} is adapted otherwise than a matrix by α/r · B·A")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name and parameter.any():  # as of PiSSA, which changes the weights too
            raise ListopdError("lora.peft.init_lora_weights: an adapter must start with B = 0")
    kept = {name for name, _ in model.named_parameters() if ".lora_" not in name}
    if wrong := {name.replace(".base_layer.", ".") for name in kept} ^ names:
        raise ListopdError(f"lora: {min(wrong)}: its name is not that in the checkpoint")
    return peft


def _is_plain(layer: LoraLayer) -> bool:
    linear = isinstance(layer, Linear) and not layer.fan_in_fan_out
    return linear and not layer.lora_variant and not layer.lora_bias[ADAPTER]


def _set_mode(model: PreTrainedModel, config: LearnerConfig) -> None:
    """No dropout: it would make the learner another policy than the sampler's."""
    if not config.gradient_checkpointing:
        model.eval()
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # layers keep their activations otherwise
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def _shard(forward: _Forward, device: str, count: int, config: LearnerConfig) -> None:
    """FSDP2: layer by layer, then embedding, head and what is left; gradients add up."""
    mesh = init_device_mesh(device, (count,))
    full = MixedPrecisionPolicy()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in getattr(forward.model.base_model, "layers", []):
        fully_shard(layer, mesh=mesh, mp_policy=half if config.autocast else full)
    fully_shard(forward, mesh=mesh)
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # Gloo knows no other


def _merged(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """W + scaling·B·A, summed in float32."""
    down, up = (whole(m[ADAPTER].weight.detach()).float() for m in (layer.lora_A, layer.lora_B))
    return (weight.float() + layer.scaling[ADAPTER] * (up @ down)).to(weight.dtype)
