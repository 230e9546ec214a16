"""Layers and their parts against what their formulas say."""

import pytest
import torch
import torch.nn.functional as F

from attnlens.attention.softmax import Softmax
from attnlens.models.block import Memory, PeriNorm, PostNorm, PreNorm
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


def layer(kind, mlp=True, norm=torch.nn.LayerNorm, dropout=0.0, cross=False):
    norms = [norm(WIDTH) for _ in range(kind.norms_per_part * (1 + mlp + cross))]
    for weight in (parameter for one in norms for parameter in one.parameters()):
        torch.nn.init.normal_(weight) if cross else None
    memory = Mha(Softmax(), WIDTH, 2) if cross else None
    return kind(Mha(Softmax(), WIDTH, 2), GeluMlp(WIDTH) if mlp else None, norms, cross=memory, dropout=dropout)


def test_pre_norm():
    block, x = layer(PreNorm), torch.randn(2, 5, WIDTH)
    y = x + block.projection(F.layer_norm(x, (WIDTH,)))
    torch.testing.assert_close(block(x), y + block.mlp(F.layer_norm(y, (WIDTH,))))


def test_post_norm():
    block, x = layer(PostNorm, norm=torch.nn.RMSNorm), torch.randn(2, 5, WIDTH)
    y = F.rms_norm(x + block.projection(x), (WIDTH,))
    torch.testing.assert_close(block(x), F.rms_norm(y + block.mlp(y), (WIDTH,)))


def test_peri_norm():
    block, x = layer(PeriNorm), torch.randn(2, 5, WIDTH)
    inner, outer, inner_mlp, outer_mlp = block.norms
    y = x + outer(block.projection(inner(x)))
    torch.testing.assert_close(block(x), y + outer_mlp(block.mlp(inner_mlp(y))))


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, PeriNorm])
def test_without_a_network_there_is_one_part(kind):
    block, x = layer(kind, mlp=False), torch.randn(1, 3, WIDTH)
    expected = block.after(0, x, block.projection(block.before(0, x)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, PeriNorm])
def test_attention_to_a_memory_stands_between_the_two(kind):
    """And token by token it is the same, with keys and values of the memory computed once."""
    block, x = layer(kind, cross=True), torch.randn(2, 4, WIDTH)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    memory = Memory(torch.randn(2, 6, WIDTH), mask)
    y = block.after(0, x, block.projection(block.before(0, x), causal=True))
    y = block.after(1, y, block.cross(block.before(1, y), memory=memory.tokens, key_padding_mask=mask))
    expected = block.after(2, y, block.mlp(block.before(2, y)))
    torch.testing.assert_close(block(x, causal=True, memory=memory), expected)
    cache, outputs = block.init_cache(2, 4, memory=memory), []
    for token in x.split(1, dim=1):
        cache, out = block.step(cache, token)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)


def test_norms_that_do_not_fit_the_parts_are_refused():
    with pytest.raises(ValueError, match="`norms` must be 4 for these parts of PeriNorm, got 2"):
        PeriNorm(Mha(Softmax(), WIDTH, 2), GeluMlp(WIDTH), [torch.nn.LayerNorm(WIDTH) for _ in range(2)])


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
