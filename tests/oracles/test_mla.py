"""Latent attention against DeepSeek-V2's module of transformers, which expands its latents at every step."""

import pytest
import torch

from attnlens.attention.softmax import Softmax
from attnlens.position.rope import Rope
from attnlens.projection.mla import Mla
from tests.oracles.feed import ROUNDED, optional

WIDTH, HEADS, RANK, ROTARY, LENGTH = 24, 3, 10, 4, 9


def deepseek(query_rank):
    module = optional("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = module.DeepseekV2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=query_rank,
        kv_lora_rank=RANK,
        qk_rope_head_dim=ROTARY,
        qk_nope_head_dim=WIDTH // HEADS,
        v_head_dim=WIDTH // HEADS,
    )
    config._attn_implementation = "eager"
    layer = module.DeepseekV2Attention(config, layer_idx=0)
    torch.nn.init.normal_(layer.kv_a_layernorm.weight)
    return layer


def paired(weight):
    """Rows of a rotated map in our pairs (j, j + d/2); DeepSeek pairs neighbors."""
    return torch.cat([weight[0::2], weight[1::2]])


def of(theirs, query_rank):
    """Our layer with their weights."""
    content = WIDTH // HEADS
    layer = Mla(Softmax(), WIDTH, HEADS, RANK, rotary_dim=ROTARY, query_rank=query_rank, position=Rope(ROTARY, LENGTH))
    with torch.no_grad():
        down = theirs.kv_a_proj_with_mqa.weight
        layer.latent.weight.copy_(torch.cat([down[:RANK], paired(down[RANK:])]))
        layer.latent_norm.weight.copy_(theirs.kv_a_layernorm.weight)
        key, value = theirs.kv_b_proj.weight.unflatten(0, (HEADS, -1)).split(content, 1)
        layer.key.weight.copy_(key.flatten(0, 1))
        layer.value.weight.copy_(value.flatten(0, 1))
        query = theirs.q_proj if query_rank is None else theirs.q_b_proj
        heads = [torch.cat([q[:content], paired(q[content:])]) for q in query.weight.unflatten(0, (HEADS, -1))]
        layer.to_query.weight.copy_(torch.cat(heads))
        if query_rank is not None:
            layer.latent_query[0].load_state_dict(theirs.q_a_proj.state_dict())
            layer.latent_query[1].load_state_dict(theirs.q_a_layernorm.state_dict())
        layer.output.load_state_dict(theirs.o_proj.state_dict())
    return layer


@pytest.mark.parametrize("query_rank", [None, 7])
def test_it_is_deepseeks_with_its_weights(query_rank):
    torch.manual_seed(0)
    theirs = deepseek(query_rank)
    ours, x = of(theirs, query_rank), torch.randn(2, LENGTH, WIDTH)
    turns = torch.complex(ours.position.cos, ours.position.sin)[None]
    future = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    expected = theirs(x, future, position_embeddings=turns)[0]
    torch.testing.assert_close(ours(x, causal=True), expected, rtol=ROUNDED, atol=ROUNDED)
    cache, outputs = ours.init_cache(2, LENGTH), []
    for token in x.split(1, dim=1):
        cache, y = ours.step(cache, token)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=ROUNDED, atol=ROUNDED)
    assert (torch.cat(outputs, 1) - expected).abs().max() < 1e-6
