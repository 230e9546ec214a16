"""What a comparison measures: interleaved times, peak memory, output errors, row sums and leaks of the future."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnlens.linalg.dense import softmax_naive
from attnlens.linalg.partial import partial_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

LEAST_SECONDS = 0.02  # a call that is shorter is repeated until its measurement lasts as long


def inputs(length: int, *, heads: int = 8, head_dim: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-normal q, k, v of shape (1, heads, length, head_dim), float32."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3))
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's fused kernel."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def task(run: Attention, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> Callable[[], None]:
    """One forward without gradients, or forward and backward with a gradient of ones."""
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                run(q, k, v)

        return forward
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        run(*leaves).sum().backward()

    return both


def interleaved(
    tasks: Mapping[str, Callable[[], None]], pairs: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every task in each of `pairs` rounds; a round runs all of them, and starts with the next one each."""
    repeats = {}
    for name, run in tasks.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(LEAST_SECONDS / max(time.perf_counter() - start, 1e-6)))
    names, seconds = list(tasks), {name: [] for name in tasks}
    for round_ in range(pairs):
        for shift in range(len(names)):
            name = names[(round_ + shift) % len(names)]
            start = clock()
            for _ in range(repeats[name]):
                tasks[name]()
            seconds[name].append((clock() - start) / repeats[name])
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> tuple[float, float, float]:
    """Median, first and third quartile over the rounds of time(slow) / time(fast)."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, low, high


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that the CPU allocator held at one time beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    assert watched.profiler is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def relative_error(run: Attention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """|out - softmax| / |softmax|, Frobenius, against float64."""
    expected = softmax_naive(q.double(), k.double(), v.double(), causal=causal)
    with torch.no_grad():
        out = run(q, k, v)
    return ((out.double() - expected).norm() / expected.norm()).item()


def mean_value_error(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """The same for the mean of the visible values: what an answer without information has."""
    return relative_error(lambda q, k, v: partial_attention(q * 0, k, v, causal=causal)[0], q, k, v, causal)


def row_sum_defect(run: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """max |out - 1| for values of ones: 0 where every row of weights sums to one."""
    with torch.no_grad():
        return (run(q, k, torch.ones_like(v)) - 1).abs().max().item()


def future_leak(run: Attention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Largest change of the first 60 % of the outputs when all later tokens change; draws are seeded anew."""
    n = q.shape[2]
    cut = int(0.6 * n)
    others = inputs(n, heads=q.shape[1], head_dim=q.shape[3], seed=1)
    changed = [torch.cat([x[:, :, :cut], y[:, :, cut:]], 2) for x, y in zip((q, k, v), others, strict=True)]
    outs = []
    for arguments in ((q, k, v), changed):
        torch.manual_seed(0)
        with torch.no_grad():
            outs.append(run(*arguments)[:, :, :cut])
    return (outs[0] - outs[1]).abs().max().item()
