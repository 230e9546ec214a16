"""Decoding from latents: the compressed form beside the expanded one, interleaved, one token over a full cache.

    python benchmarks/decode_mla.py                 # benchmarks/decode_mla.json, under a minute
    python benchmarks/decode_mla.py --cached 1024   # another number of cached tokens

`expand` makes the keys and values of all heads from the cache and attends to them, which is what a cache of latents
costs where nothing is merged; `compressed` attends to the latents. `step` is the layer's whole step of one token with
its projections. One thread, CPU time, float32, batch 1.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from peers import processor
from torch import Tensor

from attnlens.attention.softmax import Softmax
from attnlens.files import write_json
from attnlens.linalg.suffix import suffix_attention
from attnlens.projection.factored import AbstractFactored
from attnlens.projection.mla import Mla
from attnlens.projection.tpa import Tpa

STORED = Path(__file__).resolve().parent / "decode_mla.json"
WIDTH, HEADS = 2048, 16


def layers() -> dict[str, AbstractFactored]:
    """Heads of 128: latents of 512 and 64 rotated columns, and tensor products of the ranks of its paper."""
    torch.manual_seed(0)
    return {
        "mla": Mla(Softmax(), WIDTH, HEADS, 512, rotary_dim=64),
        "tpa": Tpa(Softmax(), WIDTH, HEADS, 6, 2, 2),
    }


def tasks(layer: AbstractFactored, cached: int) -> dict[str, Callable[[], Tensor]]:
    """One more token after `cached` of them, in both forms."""
    x = torch.randn(1, cached, WIDTH, generator=torch.Generator().manual_seed(0))
    full, _ = layer.step(layer.init_cache(1, 2**20), x)
    query, kept = layer.query(x[:, :1]), tuple(part.tensor for part in full.state)

    def expand() -> Tensor:
        return suffix_attention(layer.expand_query(query), *layer.expand(kept))

    def step() -> Tensor:
        nonlocal full
        full, y = layer.step(full, x[:, :1])  # a cache that is passed along is not copied
        return y

    return {"compressed": lambda: layer.attend_compressed(query, kept), "expand": expand, "step": step}


def compare(layer: AbstractFactored, cached: int, pairs: int) -> dict[str, object]:
    """Median milliseconds, the ratio of the two forms with its quartiles, their difference, and megabytes."""
    runs = tasks(layer, cached)
    outs = [runs[name]() for name in ("compressed", "expand")]
    difference = ((outs[0] - outs[1]).norm() / outs[1].norm()).item()
    seconds = measure.interleaved(
        {name: lambda run=run: (run(), None)[1] for name, run in runs.items()}, pairs, time.process_time
    )
    found: dict[str, object] = {f"{name}_ms": 1e3 * sorted(s)[len(s) // 2] for name, s in seconds.items()}
    found |= {
        f"{name}_peak_mb": measure.peak_bytes(lambda run=run: (run(), None)[1]) / 1e6 for name, run in runs.items()
    }
    found |= {"ratio": measure.ratio(seconds, "expand", "compressed"), "difference": difference}
    found["cache_mb"] = 4 * cached * layer.cache_floats / 1e6
    return found


def main() -> None:
    """Time every layer and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", type=int, default=4096, help="tokens in the cache")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved rounds")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    with torch.no_grad():
        for name, layer in layers().items():
            cases[name] = found = compare(layer, chosen.cached, chosen.pairs)
            print(
                name,
                {key: value if isinstance(value, tuple) else float(f"{value:.3g}") for key, value in found.items()},
            )
    machine = f"{processor()}, PyTorch {torch.__version__}"
    write_json(STORED, {"machine": machine, "cached": chosen.cached, "cases": cases})


if __name__ == "__main__":
    main()
