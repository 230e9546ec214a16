"""Peers as functions (q, k, v) -> out on projected tensors of shape (1, heads, length, head_dim).

Every function here imports its package when it is called, so that an absent one is skipped by name. Where a peer
projects inside, its projections are replaced by modules that hand the tensors through. Algorithms without a package are
written here as their papers state them, naively: one dense operation after another.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlens.linalg.hashing import hyperplane_code

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Slot(nn.Module):
    """Stands where a projection was and returns what it was given to hold."""

    held: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.held


def flat(x: Tensor) -> Tensor:
    """(1, h, n, d) -> (1, n, h d)."""
    return x.transpose(1, 2).flatten(2)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(1, n, h d) -> (1, h, n, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def local_attention(length: int, causal: bool, *, window: int) -> Attention:
    """local-attention: the window before and the own one, or one more after."""
    from local_attention import LocalAttention

    peer = LocalAttention(window_size=window, causal=causal, use_rotary_pos_emb=False, exact_windowsize=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(q, k, v)

    return run


def flex(length: int, causal: bool, *, window: int) -> Attention:
    """PyTorch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask)

    return run


def longformer(length: int, causal: bool, *, window: int) -> Attention:
    """transformers' LongformerSelfAttention with a window of `window` on each side and no global token."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=512, num_attention_heads=8, attention_window=[2 * window])
    peer = LongformerSelfAttention(config, 0).eval()
    slots = peer.query, peer.key, peer.value = Slot(), Slot(), Slot()
    nothing = torch.zeros(1, length)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for slot, x in zip(slots, (q, k, v), strict=True):
            slot.held = x.transpose(1, 2).flatten(2)
        hidden = slots[0].held
        out: Any = peer(
            hidden,
            attention_mask=nothing,
            is_index_masked=nothing > 0,
            is_index_global_attn=nothing > 0,
            is_global_attn=False,
        )
        return heads(out[0], q.shape[1])

    return run


def bigbird(length: int, causal: bool, *, block_size: int, num_random: int) -> Attention:
    """transformers' BigBirdBlockSparseAttention."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=512,
        num_attention_heads=8,
        block_size=block_size,
        num_random_blocks=num_random,
        max_position_embeddings=length,
    )
    peer = BigBirdBlockSparseAttention(config, seed=0).eval()
    slots = peer.query, peer.key, peer.value = Slot(), Slot(), Slot()
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), block_size)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for slot, x in zip(slots, (q, k, v), strict=True):
            slot.held = x.transpose(1, 2).flatten(2)
        blocked, band, rows, columns = masks
        out: Any = peer(slots[0].held, band, rows, columns, blocked, blocked)
        return heads(out[0], q.shape[1])

    return run


def reformer(length: int, causal: bool, *, bucket_size: int, num_rounds: int) -> Attention:
    """reformer-pytorch's LSHAttention on q as both queries and keys, buckets masked as in the paper."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    peer = LSHAttention(bucket_size=bucket_size, n_hashes=num_rounds, causal=causal, attend_across_buckets=False).eval()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(q.flatten(0, 1), v.flatten(0, 1))[0].view_as(v)

    return run


def routing(length: int, causal: bool, *, num_clusters: int, window: int) -> Attention:
    """routing-transformer's KmeansAttention with its centroids as drawn."""
    from routing_transformer.routing_transformer import KmeansAttention

    peer = KmeansAttention(num_clusters, window, 8, 64, causal=causal).eval()
    peer.kmeans.initted.fill_(True)
    peer.kmeans.means.copy_(F.normalize(torch.randn(peer.kmeans.means.shape), dim=-1))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(q, k, v)[0]

    return run


def nystrom(length: int, causal: bool, *, num_landmarks: int) -> Attention:
    """nystrom-attention without its convolution."""
    from nystrom_attention.nystrom_attention import NystromAttention

    peer = NystromAttention(dim=512, num_landmarks=num_landmarks, residual=False).eval()
    peer.to_qkv, peer.to_out = Slot(), nn.Sequential(nn.Identity())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        peer.to_qkv.held = torch.cat([flat(q), flat(k), flat(v)], -1)
        return heads(peer(peer.to_qkv.held), q.shape[1])

    return run


def linformer(length: int, causal: bool, *, num_keys: int) -> Attention:
    """linformer's LinformerSelfAttention with its projections as drawn."""
    from linformer.linformer import LinformerSelfAttention

    peer = LinformerSelfAttention(512, length, k=num_keys, heads=8).eval()
    slots = peer.to_q, peer.to_k, peer.to_v = Slot(), Slot(), Slot()
    peer.to_out = nn.Identity()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for slot, x in zip(slots, (q, k, v), strict=True):
            slot.held = x.transpose(1, 2).flatten(2)
        return heads(peer(slots[0].held), q.shape[1])

    return run


def performer(length: int, causal: bool, *, num_features: int) -> Attention:
    """performer-pytorch's FastAttention; causal by its own pure PyTorch form, as its C++ kernel is not on PyPI."""
    from performer_pytorch.performer_pytorch import FastAttention

    peer = FastAttention(64, nb_features=num_features, causal=causal, no_projection=False).eval()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(q, k, v)

    return run


def h_transformer(length: int, causal: bool, *, block_size: int) -> Attention:
    """h-transformer-1d's HAttention1D with its input as q, k, v."""
    from h_transformer_1d.h_transformer_1d import HAttention1D

    peer = HAttention1D(512, heads=8, dim_head=64, block_size=block_size).eval()
    peer.to_qkv, peer.to_out = Slot(), nn.Identity()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        peer.to_qkv.held = torch.cat([flat(q), flat(k), flat(v)], -1)
        return heads(peer(flat(q)), q.shape[1])

    return run


def naive(operation: str) -> Any:
    """The naive file of one of flash-linear-attention's operations; its package would import Triton.

    Raises:
        ImportError: fla-core is not installed.
    """
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise ImportError("fla-core is not installed", name="fla-core")
    file = Path(package.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{operation}", file)
    assert spec is not None, f"{file} is no module"
    assert spec.loader is not None, f"{file} is no module"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gates(width: int) -> Callable[[Tensor], Tensor]:
    """A sigmoid of a linear map of every key, as our operators read their gates: (1, 8, n, 64) to (1, 8, n, width)."""
    maps = torch.randn(8, 64, width) / 8
    return lambda k: torch.sigmoid(k @ maps)


def linear(length: int, causal: bool) -> Attention:
    """fla's naive chunked linear attention, normalized, on elu + 1 of q and k."""
    peer = naive("linear_attn").naive_chunk_linear_attn

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = ((f(x)).transpose(1, 2) for f, x in ((features, q), (features, k), (nn.Identity(), v)))
        return peer(q, k, v, normalize=True).transpose(1, 2)

    def features(x: Tensor) -> Tensor:
        return F.elu(x) + 1

    return run


def delta(length: int, causal: bool) -> Attention:
    """fla's naive chunked delta rule at its own chunk of 32, gates read from the keys."""
    peer, step = naive("delta_rule").delta_rule_chunkwise, gates(1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return peer(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, step(k)[..., 0])[0]

    return run


def gated_delta(length: int, causal: bool) -> Attention:
    """fla's naive chunked gated delta rule, which is also transformers' path without kernels."""
    peer, step, decay = naive("gated_delta_rule").naive_chunk_gated_delta_rule, gates(1), gates(1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        unit = (F.normalize(x, dim=-1).transpose(1, 2) for x in (q, k))
        forget, beta = (x[..., 0].transpose(1, 2) for x in (decay(k).log(), step(k)))
        return peer(*unit, v.transpose(1, 2), forget, beta)[0].transpose(1, 2)

    return run


def gla(length: int, causal: bool) -> Attention:
    """fla's naive gated linear attention, token by token: it has no chunked one."""
    peer, decay = naive("gla").naive_recurrent_gla, gates(64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, decay(k).log() / 16))
        return peer(q, k, v, g)[0].transpose(1, 2)

    return run


def hyperattention(length: int, causal: bool, *, block_size: int, num_planes: int = 7) -> Attention:
    """HyperAttention as published: both sides sorted by code, equal blocks, one uniform sample, merged by lse.

    Causal, the published recursion: halves below `4096` exactly, the lower left quarter as above.
    """
    planes = torch.randn(8, 64, num_planes)

    def partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        return (scores - lse).exp() @ v, lse

    def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        of_heads = planes if q.shape[1] == 8 else planes.repeat(q.shape[1] // 8, 1, 1)
        n = k.shape[2]
        order_q, order_k = (hyperplane_code(x, of_heads).argsort(-1)[..., None] for x in (q, k))
        q, k, v = (x.gather(2, i.expand(x.shape)) for x, i in ((q, order_q), (k, order_k), (v, order_k)))
        blocks = [x.unflatten(2, (-1, block_size)) for x in (q, k, v)]
        near, near_lse = (x.flatten(2, 3) for x in partial(*blocks))
        sample = torch.randint(n, (*q.shape[:2], block_size))
        keys, values = (x.gather(2, sample[..., None].expand(*sample.shape, x.shape[-1])) for x in (k, v))
        same = (torch.arange(n) // block_size)[:, None] == (sample // block_size)[:, :, None]
        far, far_lse = partial(q, keys, values, same)
        far_lse = far_lse + torch.tensor(n / block_size).log()
        share = torch.sigmoid(near_lse - far_lse)
        out, lse = share * near + (1 - share) * far, torch.logaddexp(near_lse, far_lse)
        back = order_q.argsort(2)
        return out.gather(2, back.expand(out.shape)), lse.gather(2, back)

    def recursive(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = q.shape[2]
        if n <= 2048:
            return partial(q, k, v, torch.ones(n, n, dtype=torch.bool).triu(1))
        halves = [torch.cat(x.chunk(2, 2), 1) for x in (q, k, v)]
        out, lse = (torch.cat(x.chunk(2, 1), 2) for x in recursive(*halves))
        half = n // 2
        low, low_lse = bidirectional(q[:, :, half:], k[:, :, :half], v[:, :, :half])
        share = torch.sigmoid(lse[:, :, half:] - low_lse)
        merged = share * out[:, :, half:] + (1 - share) * low
        merged_lse = torch.logaddexp(lse[:, :, half:], low_lse)
        return torch.cat([out[:, :, :half], merged], 2), torch.cat([lse[:, :, :half], merged_lse], 2)

    return lambda q, k, v: (recursive if causal else bidirectional)(q, k, v)[0]


def kdeformer(length: int, causal: bool, *, block_size: int, num_samples: int) -> Attention:
    """KDEformer's practical form: exact exponentials in hashed blocks, the rest by sampling values by their norm."""
    planes = torch.randn(8, 64, 7)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, d = k.shape[2], q.shape[-1]
        order_q, order_k = (hyperplane_code(x, planes).argsort(-1)[..., None] for x in (q, k))
        q, k, v = (x.gather(2, i.expand(x.shape)) for x, i in ((q, order_q), (k, order_k), (v, order_k)))
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        blocks = [x.unflatten(2, (-1, block_size)) for x in (q, k, v)]
        near = ((blocks[0] @ blocks[1].mT * d**-0.5).exp() @ blocks[2]).flatten(2, 3)
        chance = v.norm(dim=-1) / torch.linalg.matrix_norm(v, 2)[..., None] + 1 / n
        chance = chance / chance.sum(-1, keepdim=True)
        sample = torch.multinomial(chance.flatten(0, 1), num_samples, replacement=True).view(*q.shape[:2], -1)
        weight = 1 / (num_samples * chance.gather(-1, sample))
        keys, values = (x.gather(2, sample[..., None].expand(*sample.shape, x.shape[-1])) for x in (k, v))
        scores = (q @ keys.mT * d**-0.5).exp() * weight[:, :, None]
        same = (torch.arange(n) // block_size)[:, None] == (sample // block_size)[:, :, None]
        out = near + scores.masked_fill(same, 0) @ values
        out = out[..., :-1] / out[..., -1:]
        return out.gather(2, order_q.argsort(2).expand(out.shape))

    return run
