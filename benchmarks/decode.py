"""One query against many cached keys: a step of grouped-query decoding beside what PyTorch offers, and a prefill.

    OMP_NUM_THREADS=1 python benchmarks/decode.py       # half a minute; benchmarks/decode.json

8 query and 2 key/value heads of 64, batch 1, float32, one thread. Ours is a step of the policy `Full`, its append
included; `attention` is its attention alone, to keys that lie ready as they do for the peers. The roofline is the time
that copying as many bytes as the keys and values have takes at the bandwidth of a large copy in the same process (read
and write counted); `sum` is the time of adding them up, which like our step reads them from a cache that fits.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from peers import processor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attnlens.cache.full import Full
from attnlens.cache.growing import Growing
from attnlens.cache.plain import PlainState
from attnlens.files import write_json
from attnlens.linalg.suffix import suffix_attention

STORED = Path(__file__).resolve().parent / "decode.json"
HEADS, GROUPS, HEAD_DIM = 8, 2, 64
COPIED = 1 << 26  # bytes, beyond every cache


def drawn(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-normal queries (1, 8, n, 64), keys and values (1, 2, m, 64)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, HEADS, n, HEAD_DIM), (1, GROUPS, m, HEAD_DIM), (1, GROUPS, m, HEAD_DIM)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in shapes)
    return q, k, v


def repeated(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Keys and values written out once for every query head."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    return sdpa(q, k, v, is_causal=causal)


def native(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's own grouped form."""
    return sdpa(q, k, v, is_causal=causal, enable_gqa=True)


def decoding(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """A step that appends the last of the keys to the others, from the same state at each call."""
    policy, new = Full(), (k[:, :, -1:], v[:, :, -1:])
    before = policy.init(1, GROUPS, HEAD_DIM, HEAD_DIM, capacity=k.shape[2], like=k)
    before = PlainState(before.keys.append(k[:, :, :-1]), before.values.append(v[:, :, :-1]))
    # The first step copies into a buffer with room behind, as one in many does.
    after = policy.step(before, q, *new)[0]
    before = PlainState(*(Growing(x.buffer, x.length - 1) for x in after))

    def step() -> None:
        for x in before:
            x.buffer.filled = x.length  # the row of the last call is free again
        with torch.no_grad():
            policy.step(before, q, *new)

    return step


def prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens at once into an empty cache."""
    policy = Full()
    empty = policy.init(1, GROUPS, HEAD_DIM, HEAD_DIM, capacity=k.shape[2], like=k)
    return policy.step(empty, q, k, v)[1]


def quiet(run: Callable[..., Tensor], *arguments: object) -> Callable[[], None]:
    """The call without gradients."""

    def call() -> None:
        with torch.no_grad():
            run(*arguments)

    return call


def compare(tasks: dict[str, Callable[[], None]], pairs: int) -> dict[str, object]:
    """Median milliseconds, and ratios to ours: median and quartiles."""
    seconds = measure.interleaved(tasks, pairs, time.perf_counter)
    found: dict[str, object] = {f"{name}_ms": 1e3 * sorted(s)[len(s) // 2] for name, s in seconds.items()}
    for name in ("repeat", "enable_gqa"):
        for side in sorted({"ours", "attention"} & set(seconds)):
            found[f"{name}_over_{side}"] = measure.ratio(seconds, name, side)
    return found


def decode(keys: int, pairs: int) -> dict[str, object]:
    """One query against `keys` keys."""
    q, k, v = drawn(1, keys)
    source, target = (torch.ones(COPIED // 4) for _ in range(2))
    tasks = {"ours": decoding(q, k, v), "repeat": quiet(repeated, q, k, v, False)}
    tasks |= {"enable_gqa": quiet(native, q, k, v, False), "copy": quiet(target.copy_, source)}
    tasks["attention"] = quiet(suffix_attention, q, k, v)
    tasks["sum"] = quiet(lambda: k.sum() + v.sum())
    found = compare(tasks, pairs)
    bandwidth = 2 * COPIED / (float(found.pop("copy_ms")) * 1e-3)  # type: ignore[arg-type]
    bytes_read = 2 * k.numel() * k.element_size()
    ours = float(found["ours_ms"]) * 1e-3  # type: ignore[arg-type]
    found |= {"keys": keys, "copy_gb_s": bandwidth / 1e9, "read_mb": bytes_read / 1e6}
    return found | {"roofline_fraction": bytes_read / bandwidth / ours}


def main() -> None:
    """Time, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--keys", type=int, nargs="+", default=[1024, 8192, 32768])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = {"decode": [decode(keys, chosen.pairs) for keys in chosen.keys]}
    q, k, v = drawn(2048, 2048)
    tasks = {"ours": quiet(prefill, q, k, v), "repeat": quiet(repeated, q, k, v, True)}
    found["prefill"] = [compare(tasks | {"enable_gqa": quiet(native, q, k, v, True)}, chosen.pairs) | {"keys": 2048}]
    for stage, rows in found.items():
        for row in rows:
            print(stage, row)
    write_json(STORED, found | {"machine": f"{processor()}, one thread, PyTorch {torch.__version__}"})


if __name__ == "__main__":
    main()
