r"""Grouped-query to latent attention (TransMLA): one shared key, rotation gathered in its first d columns, and PCA.

(1) All groups' keys side by side are one key of G d columns, K = x [W^K_1 | .. | W^K_G]; head h of group g queries it
    by Q_h in block g and zeros elsewhere. Rotation turns each block alike. Exact.
(2) RoRoPE: at each frequency l the G values of a coordinate are mixed by an orthogonal U_l, the eigenvectors of
    sum_i x x^T + y y^T (x, y: the two coordinates that rotate together), in keys and queries. It commutes with the
    rotation: exact, for any U_l that mixes groups and not frequencies. The first of the G virtual heads then holds most
    of the energy. FreqFold (`fold` > 1) lets U also mix `fold` neighboring frequencies: more energy in the first head,
    exact only if these frequencies were equal.
(3) Only the first virtual head keeps its rotation: K^R = R x W^RK. The approximation.
(4) The other columns and the values, alpha times the first so that both have equal norms, are cut to the r directions
    of largest energy of the activations: L = x [alpha W^K' | W^V] P_r.

    K_h = [L (1/alpha) P_r^T S_h^T | K^R],  Q_h = [x W^Q_h | R x W^Q_h S^R_h],  V_h = L P_r^T (block g),

scale 1/sqrt(d), with [S^R_h | S_h] the rows of block g of U. At r = (2 G - 1) d, and already at the rank of the
activations, (4) is exact. Cache: r + d floats a token for 2 G d.

Source: "TransMLA: Multi-Head Latent Attention Is All You Need" (Meng et al., 2025), https://arxiv.org/abs/2502.07864.
Its queries are not compressed here. Coordinates j and j + d/2 rotate together.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.conversion.base import Converted, count, heads, inputs, linears, multihead, put, ranked, with_projections
from attnlens.models.base import AbstractStack
from attnlens.projection.mla import Mla
from attnlens.projection.multihead import AbstractMultiHead


class Rotation(NamedTuple):
    """U, (G d, G d) orthogonal: columns of the keys of all groups to columns of virtual heads."""

    matrix: Tensor
    energy: Tensor


def mixing(keys: Float[Tensor, "g n d"], fold: int) -> Rotation:
    """U of RoRoPE from keys before rotation, and the share of the energy in each virtual head.

    Raises:
        ValueError: `fold` does not divide the d/2 frequencies.
    """
    groups, _, d = keys.shape
    if fold < 1 or (d // 2) % fold:
        raise ValueError(f"`fold` must divide the {d // 2} frequencies, got {fold}")
    pairs = keys.double().unflatten(-1, (2, d // 2 // fold, fold))
    # One vector of G fold entries a token, half and block of frequencies.
    vectors = pairs.permute(3, 1, 2, 0, 4).flatten(3).flatten(1, 2)
    _, directions = torch.linalg.eigh(vectors.mT @ vectors)
    u = directions.flip(-1).unflatten(1, (groups, fold)).unflatten(3, (groups, fold))
    # (block, group, within) of the old column, (group, within) of the new: the c-th direction goes to virtual head
    # c // fold, so that the first holds the strongest.
    matrix = keys.new_zeros(groups, 2, d // 2 // fold, fold, groups, 2, d // 2 // fold, fold, dtype=torch.float64)
    for half in range(2):
        for block in range(d // 2 // fold):
            matrix[:, half, block, :, :, half, block, :] = u[block]
    flat = matrix.flatten(4).flatten(0, 3)
    energy = (keys.double().transpose(0, 1).flatten(1) @ flat).square().sum(0).unflatten(0, (groups, d)).sum(-1)
    return Rotation(flat, energy / energy.sum())


def transmla(model: AbstractStack, ids: Int[Tensor, "b n"], rank: int, *, fold: int = 1) -> Converted:
    """The model with latent attention of `rank`, the rotation on one head's columns.

    Args:
        ids: tokens whose activations decide U and P.
        rank: r, at most (2 G - 1) d and the width.
        fold: neighboring frequencies that U may mix.

    Raises:
        ValueError: `rank` or `fold` out of range, no rotating positions, biases, or projections that cannot be
            converted.
    """
    activations = inputs(model, ids)

    def change(layer: int, old: AbstractMultiHead) -> Mla:
        if old.position is None or any(linear.bias is not None for linear in linears(old)):
            raise ValueError(
                "`model` has no rotating positions or has biases, and this conversion moves rotations: use joint_svd, "
                "or collaborative for a model with added positions"
            )
        return latent(old, activations[layer], rank, fold)

    converted = with_projections(model, change)
    first = multihead(model.layers[0])
    head_dim = first.width // first.num_heads
    old, new = (count([block.projection for block in each.layers]) for each in (model, converted))
    return Converted(converted, new / old, rank + head_dim)


def latent(old: AbstractMultiHead, x: Float[Tensor, "n w"], rank: int, fold: int) -> Mla:
    """One layer; `x` is what it reads on the calibration tokens."""
    groups, d = old.num_groups, old.width // old.num_heads
    ranked(rank, min((2 * groups - 1) * d, old.width), "where only the dropped rotation is left")
    to_q, to_k, to_v = linears(old)
    x = x.double()
    key, value = heads(to_k, groups).double(), heads(to_v, groups).double()
    rotation = mixing(x @ key, fold).matrix
    virtual = key.transpose(0, 1).flatten(1) @ rotation  # W^Kd U
    flat = value.transpose(0, 1).flatten(1)
    alpha = (x @ flat).norm() / (x @ virtual[:, d:]).norm()
    joint = torch.cat([alpha * virtual[:, d:], flat], 1)
    _, directions = torch.linalg.eigh((x @ joint).T @ (x @ joint))
    cut = directions.flip(-1)[:, :rank]  # P_r

    new = Mla(
        old.attention,
        old.width,
        old.num_heads,
        rank,
        rotary_dim=d,
        latent_norm=False,
        scale=d**-0.5,
        position=old.position,
    ).to(to_q.weight.dtype)
    put(new.latent, torch.cat([joint @ cut, virtual[:, :d]], 1).T)
    blocks = rotation.unflatten(0, (groups, d)).repeat_interleave(old.num_heads // groups, 0)  # S of each head
    rest = (groups - 1) * d
    up_key = cut[:rest].T @ blocks[:, :, d:].mT / alpha
    up_value = cut[rest:].T.unflatten(1, (groups, d)).transpose(0, 1).repeat_interleave(old.num_heads // groups, 0)
    query = heads(to_q, old.num_heads).double()
    put(new.key, up_key.mT.flatten(0, 1))
    put(new.value, up_value.mT.flatten(0, 1))
    put(new.to_query, torch.cat([query, query @ blocks[:, :, :d]], -1).mT.flatten(0, 1))
    put(new.output, old.output.weight.detach())
    return new
