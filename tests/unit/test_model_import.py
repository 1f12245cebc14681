"""`listopd model import`: a GGUF file becomes the checkpoint that it was made of."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from listopd_ray.__main__ import main
from listopd_ray.models import PAD, build_tokenizer, load_model, load_tokenizer

TEXTS = [f"{n} blue socks {n + 1} red hat, " + '{"ranking": [2, 1]}' for n in range(200)]
UNKNOWN = "<|endoftext|>"  # which transformers adds to such tokenizers where it is not there
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def source(tokenizer):
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.3, **shape, **heads
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones otherwise, in whatever order
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def write_gguf(source, tokenizer, tmp_path):
    """A file as llama.cpp writes them: rows of queries and keys interleaved for its rotation."""

    def write(architecture="llama", kind=gguf.GGMLQuantizationType.F32, without="", heads=4):
        path, config = tmp_path / "model.gguf", source.config
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(10_000.0)
        writer.add_vocab_size(len(tokenizer))
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        tokens = [token for token, _ in sorted(bpe["vocab"].items(), key=lambda pair: pair[1])]
        writer.add_token_list([UNKNOWN if token == PAD else token for token in tokens])
        writer.add_token_types([3, 3, *[1] * (len(tokenizer) - 2)])
        writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        for name, parameter in source.named_parameters():
            layer, _, part = (
                name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
            )
            short = f"blk.{layer}.{NAMES[part]}" if part in NAMES else NAMES[f"{layer}.{part}"]
            array = parameter.detach().numpy()
            if part in HEADS:
                rows, width = array.shape
                paired = array.reshape(HEADS[part], 2, rows // HEADS[part] // 2, width)
                array = np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, width)
            if name != without:
                as_it_is = array.ndim == 1
                dtype = gguf.GGMLQuantizationType.F32 if as_it_is else kind
                stored = gguf.quants.quantize(array, dtype)
                writer.add_tensor(f"{short}.weight", stored, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@torch.inference_mode()
def logprobs(model, ids):
    return torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(gguf.GGMLQuantizationType.F32, 0.0), (gguf.GGMLQuantizationType.Q8_0, 1 / 254 + 1 / 2048)],
)
def test_the_checkpoint_is_the_model_that_the_file_was_made_of(
    source, tokenizer, write_gguf, tmp_path, capsys, kind, tolerance
):
    out = tmp_path / "models" / "tiny"
    main(["model", "import", f"gguf={write_gguf(kind=kind)}", f"out={out}"])
    assert f"{out}: LlamaForCausalLM, 0.1 M parameters" in capsys.readouterr().out
    found, text = load_model(out), load_tokenizer(out)
    own = {UNKNOWN if t == PAD else t: number for t, number in tokenizer.get_vocab().items()}
    assert text.get_vocab() == own
    ids = tokenizer.encode(TEXTS[3])  # a file does not say how text is split before the merges
    assert text.decode(ids) == text.decode(text.encode(TEXTS[3])) == TEXTS[3]
    given = dict(source.named_parameters())
    for name, weight in found.named_parameters():  # 8 bits: 127 steps, their size in float16
        assert (weight - given[name]).abs().max() <= tolerance * given[name].abs().max(), name
    if not tolerance:
        torch.testing.assert_close(logprobs(found, ids), logprobs(source, ids))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # readable by the same people


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "unheard"}, "cannot be converted: GGUF model with architecture unheard"),
        ({"heads": 5}, "cannot be converted: "),
        ({"without": "model.layers.1.mlp.up_proj.weight"}, "weights are missing: model.layers.1"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_nothing_is_written(
    write_gguf, tmp_path, options, message
):
    file = write_gguf(**options)
    with pytest.raises(SystemExit) as raised:
        main(["model", "import", f"gguf={file}", f"out={tmp_path / 'out' / 'model'}"])
    assert message in raised.value.code and "\n" not in raised.value.code
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [None, b"", b"no GGUF at all", b"GGUF\x03\x00\x00\x00cut"])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as raised:
        main(["model", "import", f"gguf={file}", f"out={tmp_path / 'out'}"])
    assert raised.value.code.startswith(f"listopd: error: gguf: {file}: ")
    assert "\n" not in raised.value.code


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_file_that_is_cut_is_one_line(write_gguf, tmp_path, share):
    file = write_gguf()
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(SystemExit) as raised:
        main(["model", "import", f"gguf={file}", f"out={tmp_path / 'out'}"])
    assert "cannot be converted: " in raised.value.code and "\n" not in raised.value.code
    assert not (tmp_path / "out").exists()


def test_a_directory_that_exists_stays_as_it_is(write_gguf, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="out: exists already"):
        main(["model", "import", f"gguf={write_gguf()}", f"out={tmp_path / 'out'}"])
    assert not list((tmp_path / "out").iterdir())


def test_both_keys_are_needed(tmp_path):
    with pytest.raises(SystemExit, match="give gguf=FILE and out=DIR"):
        main(["model", "import", f"out={tmp_path / 'out'}"])
