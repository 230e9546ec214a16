"""One healthy operator and, for each row of the contract, a variant that breaks it as real implementations did."""

from typing import NamedTuple

import torch
from torch import Tensor

from attnlens.attention.base import AbstractAttention, AbstractRecurrentAttention
from attnlens.attention.mean import mean_values
from attnlens.attention.softmax import softmax_weights


class Dense(AbstractAttention):
    """Softmax attention by its definition."""

    family = "test"
    row_stochastic = True

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()
        self.seed = seed

    @classmethod
    def exact_at(cls, length):
        return {}

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return softmax_weights(q, k, causal=causal, key_padding_mask=key_padding_mask) @ v


class Sampled(Dense):
    """The mean of `num_samples` noisy kernels: order 1/2, unbiased, with a bound that is always true."""

    budget = "num_samples"
    order = 0.5
    unbiased = True
    row_stochastic = False
    noise, power = 0.1, 0.5

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int, num_samples: int = 64) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(max_length, max_length, generator=generator, dtype=torch.float64)
        self.register_buffer("draw", 1 + self.noise * draw * num_samples**-self.power)

    exact_at = AbstractAttention.exact_at

    def kernel(self, q, k):
        return self.kernel_target(q, k) * self.draw[: q.shape[2], : k.shape[2]]

    def error_bound(self, q, k, v, *, causal=False, key_padding_mask=None):
        return v.norm(dim=-1).amax(-1, keepdim=True).expand(q.shape[:3]) * 4

    def attend(self, q, k, v, *, causal, key_padding_mask):
        weights = softmax_weights(q, k, causal=causal, key_padding_mask=key_padding_mask)
        weights = weights * self.draw[: q.shape[2], : k.shape[2]].to(q)
        return weights / weights.sum(-1, keepdim=True).clamp_min(1e-30) @ v


class State(NamedTuple):
    """Sum of the values so far, and their number."""

    total: Tensor
    count: Tensor


class Running(AbstractRecurrentAttention):
    """mean(V) as a recurrence."""

    family = "test"
    target = "itself"
    row_stochastic = True

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__()

    def init_state(self, batch, num_heads, head_dim, value_dim, like):
        return State(like.new_zeros(batch, num_heads, 1, value_dim), like.new_zeros(()))

    def step(self, state, q, k, v):
        count = state.count + torch.arange(1, v.shape[2] + 1, device=v.device, dtype=v.dtype)
        total = state.total + v.cumsum(2)
        return State(total[:, :, -1:], count[-1]), total / count[:, None] + q.sum(-1, keepdim=True) * 0

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return mean_values(v, causal=causal, key_padding_mask=key_padding_mask) + q.sum(-1, keepdim=True) * 0


class NoFamily(Dense):
    """declarations: the budget names no argument."""

    budget = "num_feature"


class Overflowing(Dense):
    """shapes: exponentials without a maximum subtracted are not finite in float32."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        weights = torch.exp(60 * q @ k.mT)
        return weights / weights.sum(-1, keepdim=True) @ v


class BatchMaximum(Dense):
    """examples_do_not_mix: a constant taken over the whole batch, as a peer's pseudo-inverse starts from."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        out = super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
        return out * (1 + k.amax() * 1e-3)


class FutureStabilizer(Dense):
    """causal: a maximum over all keys swamped by an added constant, as a peer's causal random features have."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        weights = torch.exp(q @ k.mT - (q @ k.mT).amax()) + 1e-4
        weights = weights.tril() if causal else weights
        return weights / weights.sum(-1, keepdim=True) @ v


class NotReallyCausal(Dense):
    """causal: declares that it cannot be causal, and does not refuse."""

    causal = False

    def _check(self, *arguments):
        return None


class ForgetsPadding(Dense):
    """padding_is_never_read: padded keys are zero but still take weight."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return softmax_weights(q, k, causal=causal) @ v


class ForgottenGradient(Dense):
    """gradients: the normalizer is a constant for the gradient, as a kernel's lse without backward is."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        weights = softmax_weights(q, k, causal=causal, key_padding_mask=key_padding_mask)
        return weights.detach() @ v + (q.sum() - q.sum().detach())


class SwallowsNan(Dense):
    """nan_query_stays_in_its_row: a broken query comes out as healthy zeros."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return torch.nan_to_num(super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask))


class SpreadsNan(Dense):
    """nan_query_stays_in_its_row: one broken query spoils every row."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask) + 0 * q.sum()


class RowsSumToMore(Dense):
    """constant_values: coarse values summed, the normalizer not multiplied by the cluster's size."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return 8 * super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask)


class WrongScale(Dense):
    """exact_limit: converges to softmax(QK^T/d), as two published baselines do."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        q = q * q.shape[-1] ** -0.5
        return super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask)


class LosesState(Running):
    """recurrence: the second piece starts from nothing."""

    def step(self, state, q, k, v):
        empty = State(torch.zeros_like(state.total), torch.zeros_like(state.count))
        return super().step(empty, q, k, v)


class WritesState(Running):
    """recurrence: the state that was passed in is changed in place."""

    def step(self, state, q, k, v):
        new, out = super().step(state, q, k, v)
        state.total.copy_(new.total)
        return new, out


class Optimistic(Sampled):
    """error_bound: a bound that does not hold."""

    def error_bound(self, q, k, v, *, causal=False, key_padding_mask=None):
        return 1e-6 * v.norm(dim=-1)


class NoConvergence(Sampled):
    """order: declares 1/2, converges with 1/4."""

    power = 0.25


class Biased(Sampled):
    """unbiased: the kernel is off by a tenth in the mean."""

    def kernel(self, q, k):
        return 1.1 * super().kernel(q, k)


class HostTensor(Dense):
    """device_independence: positions made on the host."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        positions = torch.arange(k.shape[2], dtype=torch.float32)
        return super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask) + positions.sum().item() * 0


class Fresh(Dense):
    """repeatability: a draw in the forward pass."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        out = super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
        return out + 1e-3 * torch.randn_like(out)


class HiddenDraw(Dense):
    """repeatability: a draw that is not in the state."""

    def __init__(self, head_dim: int, num_heads: int, max_length: int, seed: int) -> None:
        super().__init__(head_dim, num_heads, max_length, seed)
        self.shift = torch.randn((), generator=torch.Generator().manual_seed(seed))

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask) + self.shift


class BranchesOnData(Dense):
    """compilation: a Python branch on a value."""

    def attend(self, q, k, v, *, causal, key_padding_mask):
        out = super().attend(q, k, v, causal=causal, key_padding_mask=key_padding_mask)
        return out if q.sum() > 0 else -out


HEALTHY = (Dense, Sampled, Running)
BROKEN = {
    "declarations": (NoFamily,),
    "shapes": (Overflowing,),
    "examples_do_not_mix": (BatchMaximum,),
    "causal": (FutureStabilizer, NotReallyCausal),
    "padding_is_never_read": (ForgetsPadding,),
    "gradients": (ForgottenGradient,),
    "nan_query_stays_in_its_row": (SwallowsNan, SpreadsNan),
    "constant_values": (RowsSumToMore,),
    "exact_limit": (WrongScale,),
    "recurrence": (LosesState, WritesState),
    "error_bound": (Optimistic,),
    "order": (NoConvergence,),
    "unbiased": (Biased,),
    "device_independence": (HostTensor,),
    "repeatability": (Fresh, HiddenDraw),
    "compilation": (BranchesOnData,),
}
