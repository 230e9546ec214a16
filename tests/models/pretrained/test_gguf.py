"""Files of the format, small ones: what stands where, and what is wrong with them."""

import gguf
import numpy as np
import pytest
import torch

from attnlens.models.pretrained.gguf import Gguf, halves
from attnlens.models.pretrained.smollm2 import convert, load_smollm2

WIDTH, HIDDEN, HEADS, GROUPS, WORDS = 16, 24, 4, 2, 6
LAYER = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}


def write(path, *, leave_out=(), more=(), architecture="llama"):
    """A model of two layers and six tokens; returns its tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_vocab_size(WORDS)
    writer.add_context_length(32)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<end>", "a", "b", "c", "ab", "abc"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    random, tensors = np.random.default_rng(0), {}
    shapes = {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYER.items()}
    shapes |= {"token_embd.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,), **dict(more)}
    for name in shapes.keys() - set(leave_out):
        tensors[name] = random.standard_normal(shapes[name]).astype(np.float32)
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_rows_of_pairs_become_halves():
    """The inverse of how llama.cpp lays rows down, and scores under rotation stay what they are."""
    weight = torch.arange(12.0)[:, None]
    assert halves(weight, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_a_file_becomes_the_model_that_its_tensors_say(tmp_path):
    tensors = write(tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "cache", torch.float32, stamp="x")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "cache/model.safetensors")
    assert len(found) == len(tensors)
    assert np.array_equal(found["blocks.1.projection.output.weight"], tensors["blk.1.attn_output.weight"])
    assert np.array_equal(found["blocks.0.mlp.gate.weight"], tensors["blk.0.ffn_gate.weight"])
    rows = halves(torch.from_numpy(tensors["blk.0.attn_k.weight"]), GROUPS)
    assert torch.equal(found["blocks.0.projection.inputs.1.weight"], rows)
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(tmp_path / "cache/tokenizer.json")).encode("abcab<end>").ids == [5, 4, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leave_out": ["blk.1.ffn_up.weight"]}, r"missing \['blocks.1.mlp.inner.weight'\]"),
        ({"more": [("blk.0.attn_q.bias", (WIDTH,))]}, r"left over \['blocks.0.projection.inputs.0.bias'\]"),
        ({"more": [("output_norm.weight", (WIDTH + 2,))]}, r"norm.weight \(18,\), not \(16,\)"),
        ({"more": [("blk.0.attn_q.weight", (WIDTH - 1, WIDTH))]}, r"inputs.0.weight \(15, 16\), not \(16, 16\)"),
        ({"architecture": "gpt2"}, "is a model of 'gpt2'"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, change, message):
    write(tmp_path / "model.gguf", **change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "cache", torch.float32, stamp="x")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "model.gguf"
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model.gguf.*(cannot be read|ends before).*fetch it again"):
        Gguf(path)


def test_a_damaged_source_is_refused_before_it_is_read(tmp_path):
    from attnlens.files import write_json

    folder = tmp_path / "raw" / "smollm2"
    folder.mkdir(parents=True)
    write(folder / "model.gguf")
    write_json(folder / "manifest.json", {"sha256": "0", "files": {"model.gguf": "1" * 64}})
    with pytest.raises(ValueError, match="is damaged: expected SHA-256 1111"):
        load_smollm2(folder)


def laid_down(folder):
    """A tiny model as a fetched source."""
    from attnlens.data.integrity import sha256
    from attnlens.files import write_json

    folder.mkdir(parents=True)
    write(folder / "model.gguf")
    write_json(folder / "manifest.json", {"sha256": "0", "files": {"model.gguf": sha256(folder / "model.gguf")}})
    return folder


def test_a_cache_that_was_cut_short_is_made_again(tmp_path):
    """Opening it raised safetensors' own error, which named neither the file nor a remedy."""
    folder, weights = laid_down(tmp_path / "raw" / "tiny"), tmp_path / "cache" / "half" / "model.safetensors"
    expected = load_smollm2(folder, cache=tmp_path / "cache").model.state_dict()
    weights.write_bytes(weights.read_bytes()[:-10])
    found = load_smollm2(folder, cache=tmp_path / "cache").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_source_of_another_model_is_refused(tmp_path):
    from attnlens.files import write_json
    from attnlens.models.pretrained.minilm import load_minilm

    with pytest.raises(ValueError, match=r"tiny` lacks \['config.json', .*source=minilm"):
        load_minilm(laid_down(tmp_path / "raw" / "tiny"))
    (tmp_path / "raw" / "none").mkdir()
    write_json(tmp_path / "raw" / "none" / "manifest.json", {"sha256": "0", "files": {}})
    with pytest.raises(ValueError, match=r"none` holds 0 GGUF files.*source=smollm2"):
        load_smollm2(tmp_path / "raw" / "none")
