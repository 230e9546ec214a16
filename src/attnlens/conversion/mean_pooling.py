"""Multi-head to grouped-query attention: the keys and the values of a group's heads become their mean.

    W^K_g = mean_{h in group g} W^K_h,   W^V_g likewise,   queries stay.

From grouped-query attention the groups themselves are pooled, down to one (multi-query attention). Exact only where
nothing is pooled, and where the heads of a group agree; the paper trains on for 5 % of the original steps.

Source: "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints" (Ainslie et al., 2023),
https://arxiv.org/abs/2305.13245.
"""

from jaxtyping import Float
from torch import Tensor

from attnlens.conversion.base import Converted, count, linears, multihead, put, with_projections
from attnlens.models.base import AbstractStack
from attnlens.projection.gqa import Gqa
from attnlens.projection.multihead import AbstractMultiHead


def pool(rows: Float[Tensor, "o *i"], old_groups: int, new_groups: int) -> Float[Tensor, "p *i"]:
    """The mean over neighboring groups of the rows of one map."""
    return rows.unflatten(0, (new_groups, old_groups // new_groups, -1)).mean(1).flatten(0, 1)


def mean_pooling(model: AbstractStack, num_groups: int) -> Converted:
    """The model with `num_groups` key/value groups in each layer.

    Raises:
        ValueError: `num_groups` does not divide the model's groups, or projections that cannot be converted.
    """

    def change(layer: int, old: AbstractMultiHead) -> Gqa:
        if num_groups < 1 or old.num_groups % num_groups:
            raise ValueError(f"`num_groups` must divide the {old.num_groups} of the model, got {num_groups}")
        bias = linears(old)[0].bias is not None
        new = Gqa(old.attention, old.width, old.num_heads, num_groups, position=old.position, bias=bias)
        new.to(old.output.weight.dtype)
        for part, (source, target) in enumerate(zip(linears(old), linears(new), strict=True)):
            groups = (old.num_groups, num_groups) if part else (1, 1)
            biased = None if source.bias is None else pool(source.bias.detach(), *groups)
            put(target, pool(source.weight.detach(), *groups), biased)
        put(new.output, old.output.weight.detach(), old.output.bias)
        return new

    converted = with_projections(model, change)
    old, new = (
        count([linear for block in each.layers for linear in linears(multihead(block))[1:]])
        for each in (model, converted)
    )
    head_dim = multihead(model.layers[0]).width // multihead(model.layers[0]).num_heads
    return Converted(converted, new / old, 2 * num_groups * head_dim)
