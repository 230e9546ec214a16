"""Draws, and what a policy answers to a sequence that comes in pieces."""

import torch

WIDTH, VALUE_WIDTH = 8, 6


def drawn(length, *, batch=2, heads=4, groups=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, length, WIDTH), (batch, groups, length, WIDTH), (batch, groups, length, VALUE_WIDTH)
    return tuple((2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes)


def begun(policy, q, k, v):
    return policy.init(q.shape[0], k.shape[1], k.shape[3], v.shape[3], capacity=1000, like=q)


def run(policy, lengths, q, k, v, state=None):
    """The state behind pieces of these lengths and all outputs."""
    state, outputs = begun(policy, q, k, v) if state is None else state, []
    for parts in zip(*(x[:, :, : sum(lengths)].split(list(lengths), 2) for x in (q, k, v)), strict=True):
        state, out = policy.step(state, *parts)
        outputs.append(out)
    return state, torch.cat(outputs, 2)
