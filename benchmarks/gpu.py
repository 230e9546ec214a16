"""Our operators on a GPU beside PyTorch's exact kernel: forward and forward with backward, float32.

    python benchmarks/gpu.py --out benchmarks/gpu.json

Times are medians of 20 calls between CUDA events after 5 warm-up calls, the two sides interleaved; memory is the peak
that the allocator held beyond the inputs. Batch 1, 8 heads of 64, the arguments of `cases.CASES`.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from cases import CASES
from peers import configured

from attnlens.attention import build
from attnlens.files import write_json

LENGTHS = (4096, 16384)


def milliseconds(run: Callable[[], None]) -> float:
    """Time of one call on the device."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def peak_mb(run: Callable[[], None]) -> float:
    """Most memory held beyond what is held now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def compare(method: str, arguments: dict[str, object], length: int, causal: bool, backward: bool) -> dict[str, object]:
    """One line: our time, that of the exact kernel, their median ratio and both peaks."""
    operator = build(configured(method, arguments), head_dim=64, num_heads=8, max_length=length).eval().cuda()
    tensors = [x.cuda() for x in measure.inputs(length)]
    tasks = {
        "ours": measure.task(lambda q, k, v: operator(q, k, v, causal=causal), *tensors, backward),
        "exact": measure.task(lambda q, k, v: measure.exact(q, k, v, causal), *tensors, backward),
    }
    for _ in range(5):
        for run in tasks.values():
            run()
    rounds = [{name: milliseconds(run) for name, run in tasks.items()} for _ in range(20)]
    found: dict[str, object] = {f"{name}_ms": statistics.median(r[name] for r in rounds) for name in tasks}
    found["exact_ratio"] = statistics.median(r["exact"] / r["ours"] for r in rounds)
    found |= {f"{name}_peak_mb": peak_mb(run) for name, run in tasks.items()}
    return found


def main() -> None:
    """Every case at every length, forward and with backward."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    stored: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "lines": []}
    lines: list[dict[str, object]] = []
    for method, arguments, causal in {
        (c.method, repr(c.arguments), c.causal): (c.method, c.arguments, c.causal) for c in CASES
    }.values():
        for length in LENGTHS:
            for backward in (False, True):
                line: dict[str, object] = {"method": method, "arguments": arguments, "causal": causal}
                line |= {"length": length, "backward": backward}
                try:
                    line |= compare(method, arguments, length, causal, backward)
                except torch.OutOfMemoryError:
                    line["skipped"] = "out of memory"
                lines.append(line)
                print(line, flush=True)
                stored["lines"] = lines
                write_json(out, stored)


if __name__ == "__main__":
    main()
