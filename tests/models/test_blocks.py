"""Layers and their parts against what their formulas say."""

import pytest
import torch
import torch.nn.functional as F

from attnlens.attention.softmax import Softmax
from attnlens.models.block import PostNorm, PreNorm
from attnlens.models.embedding import TokenEmbedding
from attnlens.models.heads import PooledHead, TokenHead
from attnlens.models.mlp import GeluMlp, SwigluMlp
from attnlens.projection.mha import Mha

WIDTH = 8


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def layer(kind, mlp=True, norm=torch.nn.LayerNorm, dropout=0.0):
    norms = [norm(WIDTH) for _ in range(1 + mlp)]
    return kind(Mha(Softmax(), WIDTH, 2), GeluMlp(WIDTH) if mlp else None, norms, dropout=dropout)


def test_pre_norm():
    block, x = layer(PreNorm), torch.randn(2, 5, WIDTH)
    y = x + block.projection(F.layer_norm(x, (WIDTH,)))
    torch.testing.assert_close(block(x), y + block.mlp(F.layer_norm(y, (WIDTH,))))


def test_post_norm():
    block, x = layer(PostNorm, norm=torch.nn.RMSNorm), torch.randn(2, 5, WIDTH)
    y = F.rms_norm(x + block.projection(x), (WIDTH,))
    torch.testing.assert_close(block(x), F.rms_norm(y + block.mlp(y), (WIDTH,)))


@pytest.mark.parametrize("kind", [PreNorm, PostNorm])
def test_without_a_network_there_is_one_part(kind):
    block, x = layer(kind, mlp=False), torch.randn(1, 3, WIDTH)
    expected = x + block.projection(block.before(0, x))
    torch.testing.assert_close(block(x), block.after(0, expected))


def test_dropout_acts_in_training_only():
    block, x = layer(PreNorm, dropout=0.5), torch.randn(1, 3, WIDTH)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_networks():
    x = torch.randn(2, 3, WIDTH)
    gelu, swiglu = GeluMlp(WIDTH, expansion=2), SwigluMlp(WIDTH, expansion=3)
    hidden = x @ gelu.inner.weight.T + gelu.inner.bias
    inside = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(gelu(x), inside @ gelu.outer.weight.T + gelu.outer.bias)
    gate = x @ swiglu.gate.weight.T
    inside = gate * gate.sigmoid() * (x @ swiglu.inner.weight.T)
    torch.testing.assert_close(swiglu(x), inside @ swiglu.outer.weight.T)
    assert inside.shape[-1] == 3 * WIDTH


def test_pooling_reads_real_tokens_only():
    head, x = PooledHead(WIDTH, 3), torch.randn(2, 6, WIDTH)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    poisoned = torch.where(mask[..., None], x, torch.nan)
    expected = torch.cat([head(x[:1, :4]), head(x[1:])])
    torch.testing.assert_close(head(poisoned, key_padding_mask=mask), expected)
    torch.testing.assert_close(head(x), head.linear(x.mean(1)))
    assert TokenHead(WIDTH, 3)(x).shape == (2, 6, 3)


def test_embedding_has_the_size_asked_for():
    embedding = TokenEmbedding(1000, WIDTH, std=0.5)
    assert abs(embedding.weight.std().item() - 0.5) < 0.02
    assert torch.equal(embedding(torch.tensor([[3, 1]]))[0], embedding.weight[[3, 1]])
