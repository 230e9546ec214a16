"""Small random models of the kinds that conversions meet."""

import torch
from torch import nn

from attnlens.attention.softmax import Softmax
from attnlens.models.block import PostNorm, PreNorm
from attnlens.models.decoder import Decoder
from attnlens.models.embedding import TokenEmbedding
from attnlens.models.encoder import Encoder
from attnlens.models.heads import MeanHead, TokenHead
from attnlens.models.mlp import GeluMlp, SwigluMlp
from attnlens.position.learned import Learned
from attnlens.position.rope import Rope
from attnlens.projection.gqa import Gqa
from attnlens.projection.mha import Mha

WIDTH, HEADS, GROUPS, WORDS, LENGTH = 24, 6, 3, 17, 10


def decoder(groups=GROUPS, dim=4):
    """Like SmolLM2: rotary, grouped queries, no biases."""
    position = Rope(dim, 32)
    blocks = []
    for _ in range(2):
        gqa = Gqa(Softmax(), HEADS * dim, HEADS, groups, position=position)
        blocks.append(PreNorm(gqa, SwigluMlp(HEADS * dim, expansion=2), [nn.RMSNorm(HEADS * dim) for _ in range(2)]))
    head = TokenHead(HEADS * dim, WORDS)
    return _random(Decoder(TokenEmbedding(WORDS, HEADS * dim), position, blocks, nn.RMSNorm(HEADS * dim), head))


def encoder():
    """Like MiniLM: learned positions, biases, a network of four times the width."""
    blocks = []
    for _ in range(2):
        mha = Mha(Softmax(), WIDTH, HEADS, bias=True)
        blocks.append(PostNorm(mha, GeluMlp(WIDTH), [nn.LayerNorm(WIDTH) for _ in range(2)]))
    position = Learned(WIDTH, 32)
    return _random(Encoder(TokenEmbedding(WORDS, WIDTH), position, blocks, nn.Identity(), MeanHead()))


def ids(batch=4, seed=0):
    return torch.randint(WORDS, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def _random(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            parameter.add_(1.0 if parameter.ndim == 1 and parameter.numel() == WIDTH else 0.0)
    return model.double().eval()
