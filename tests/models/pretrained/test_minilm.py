"""MiniLM in our own classes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnlens.models.pretrained.minilm import build, embed, read_tensors
from attnlens.models.pretrained.weights import assign, exact
from tests.models.pretrained.sources import fetched

SENTENCES = ["A man is eating food.", "Someone is having a meal.", "The girl is carrying a baby."]


def test_similarities_are_those_of_sentence_transformers(minilm):
    """.689 for the first pair; tests/oracles compares with transformers."""
    vectors = embed(minilm, SENTENCES)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert round((vectors[0] @ vectors[1]).item(), 3) == 0.689
    assert vectors[0] @ vectors[2] < 0.2


def test_a_sentence_is_the_same_beside_longer_ones(minilm):
    alone = torch.cat([embed(minilm, [sentence]) for sentence in SENTENCES])
    together = embed(minilm, [*SENTENCES, "A much longer sentence than all the others are, " * 5])[:3]
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


def test_a_long_text_is_cut_and_keeps_its_end_token(minilm):
    text = "word " * 700
    torch.testing.assert_close(embed(minilm, [text]), embed(minilm, ["word " * 510]))


def test_files_that_are_not_it_are_refused(tmp_path):
    folder = fetched("minilm")
    tensors = load_file(folder / "model.safetensors")
    broken = dict(tensors)
    broken.pop("encoder.layer.3.output.dense.bias")
    save_file(broken, tmp_path / "broken.safetensors")
    config = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 384, "layer_norm_eps": 1e-12}
    config |= {"num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config |= {"vocab_size": 30522, "max_position_embeddings": 512}
    with pytest.raises(ValueError, match=r"missing \['blocks.3.mlp.outer.bias'\]"):
        assign(build(config, exact), read_tensors(tmp_path / "broken.safetensors"), "broken.safetensors")
    with pytest.raises(ValueError, match="left over"):
        assign(build(config | {"num_hidden_layers": 5}, exact), read_tensors(folder / "model.safetensors"), "it")
    (tmp_path / "short.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"short.safetensors.*cannot be read.*fetch it again"):
        read_tensors(tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="`config` is of 'gpt2'"):
        build(config | {"model_type": "gpt2"}, exact)
