"""Our operators beside the packages that people use, interleaved, each case in a process of its own.

    python benchmarks/peers.py                      # every case, about ten minutes; benchmarks/peers.json
    python benchmarks/peers.py reformer bigbird     # the cases whose names begin so
    python benchmarks/peers.py --threads 1          # one thread alone
    python -m attnlens.report.readme                # the table in README

On one thread the clock is the process's CPU time, on more it is the wall's. Peers come with
`pip install -c constraints.txt -e '.[peers]'`; one that is not installed is skipped by name. Errors on real Q, K, V
need `benchmarks/real.py` first.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import measure
import torch
import yaml
from cases import CASES, Case
from real import captured
from torch import Tensor

from attnlens.attention import build
from attnlens.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks/peers.json"
ERROR_LENGTH = 1024


def configured(method: str, arguments: dict[str, object]) -> dict[str, object]:
    """The file of conf/attention with the values of a case in it."""
    config = yaml.safe_load((ROOT / f"conf/attention/{method}.yaml").read_text(encoding="utf-8"))
    return {**config, **arguments}


def at(length: int, case: Case, arguments: dict[str, object]) -> dict[str, object]:
    """Arguments of either side at a length."""
    changed = {name: value for name, value in case.short.items() if name in arguments}
    return arguments if length == case.length else arguments | changed


def ours(case: Case, length: int) -> measure.Attention:
    """The operator of a case as a function of q, k, v."""
    config = configured(case.method, at(length, case, case.arguments))
    operator = build(config, head_dim=64, num_heads=8, max_length=length).eval()
    return lambda q, k, v: operator(q, k, v, causal=case.causal)


def peer(case: Case, length: int) -> measure.Attention | str | None:
    """The peer as a function, the reason why there is none, or None where the case names none."""
    if case.peer is None:
        return None
    torch.manual_seed(0)
    try:
        return case.peer(length, case.causal, **at(length, case, case.peer_arguments))
    except ImportError as error:
        return f"{error.name} is not installed"


def timed(case: Case, runs: dict[str, measure.Attention], pairs: int, threads: int) -> dict[str, object]:
    """Median milliseconds and ratios of one case at one thread count: CPU time on one thread, wall time on more."""
    torch.set_num_threads(threads)
    tensors = measure.inputs(case.length)
    tasks = {name: measure.task(run, *tensors, case.backward) for name, run in runs.items()}
    seconds = measure.interleaved(tasks, pairs, time.process_time if threads == 1 else time.perf_counter)
    found: dict[str, object] = {f"{name}_ms": 1e3 * sorted(s)[len(s) // 2] for name, s in seconds.items()}
    for name in runs:
        if name != "ours":
            found[f"{name}_ratio"] = measure.ratio(seconds, name, "ours")
    return found


def probed(case: Case, run: Callable[..., Tensor], real: tuple[Tensor, ...] | None) -> dict[str, float | None]:
    """Errors against softmax, row sums and leak of one side at a length that a float64 reference can be had for."""
    gaussian = measure.inputs(ERROR_LENGTH)
    found: dict[str, float | None] = {
        "error_gaussian": measure.relative_error(run, *gaussian, case.causal),
        "error_real": None if real is None else measure.relative_error(run, *real, case.causal),
        "row_sum_defect": measure.row_sum_defect(run, *gaussian),
        "future_leak": measure.future_leak(run, *gaussian) if case.causal else None,
    }
    return found


def compare(case: Case, pairs: int, threads: Iterable[int], real: tuple[Tensor, ...] | None) -> dict[str, object]:
    """One line of the table."""
    found: dict[str, object] = {"name": case.name, "method": case.method, "arguments": case.arguments}
    found |= {"length": case.length, "causal": case.causal, "backward": case.backward, "goal": case.goal}
    runs: dict[str, measure.Attention] = {"ours": ours(case, case.length)}
    other = peer(case, case.length)
    if isinstance(other, str):
        found["skipped"] = other
    elif other is not None:
        runs["peer"] = other
        found["peer"] = (case.peer.__doc__ or "").split("\n")[0] if case.peer else ""
    runs["exact"] = lambda q, k, v: measure.exact(q, k, v, case.causal)
    for count in threads:
        found[f"threads_{count}"] = timed(case, runs, pairs, count)
    torch.set_num_threads(1)
    tensors = measure.inputs(case.length)
    for name, run in runs.items():
        found[f"{name}_peak_mb"] = measure.peak_bytes(measure.task(run, *tensors, case.backward)) / 1e6
    if not case.backward:
        found["ours_probe"] = probed(case, ours(case, ERROR_LENGTH), real)
        short = peer(case, ERROR_LENGTH)
        found["peer_probe"] = probed(case, short, real) if callable(short) else None
    return found


def line(found: dict[str, object]) -> str:
    """What the console shows of a case."""
    parts = [f"{found['name']:24s} n={found['length']}"]
    for key, value in found.items():
        if key.startswith("threads_") and isinstance(value, dict):
            sides = [side for side in ("peer", "exact") if f"{side}_ratio" in value]
            ratios = [f"{side} {value[f'{side}_ratio'][0]:.2f}x" for side in sides]
            parts.append(f"{key[8:]} thread(s): {value['ours_ms']:.1f} ms, " + ", ".join(ratios))
    parts.append("MB " + "/".join(f"{found[f'{s}_peak_mb']:.0f}" for s in ("ours", "peer") if f"{s}_peak_mb" in found))
    for side in ("ours_probe", "peer_probe"):
        probe = found.get(side)
        if isinstance(probe, dict):
            shown = [f"{k.replace('error_', '')} {v:.2g}" for k, v in probe.items() if v is not None]
            parts.append(f"{side[:4]}: " + " ".join(shown))
    return "  ".join(parts)


def processor() -> str:
    """The name of the CPU, where the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    """Run the chosen cases and keep their lines beside those of earlier runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of case names; all by default")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved rounds of each case")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    chosen = parser.parse_args()
    cases = [case for case in CASES if not chosen.names or any(case.name.startswith(n) for n in chosen.names)]
    if not cases:
        sys.exit(f"no case begins with {chosen.names}; there are {[case.name for case in CASES]}")
    stored = read_json(STORED) if STORED.exists() else {"cases": {}}
    assert isinstance(stored, dict)
    for case in cases:
        # A process of its own: what earlier cases left in the allocator makes later ones up to twice as fast.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found = fresh.submit(compare, case, chosen.pairs, chosen.threads, captured()).result()
        print(line(found), flush=True)
        stored["machine"] = f"{processor()}, {os.cpu_count()} cores, PyTorch {torch.__version__}"
        stored["cases"][case.name] = found
        # In the order of the list, whatever was run first.
        stored["order"] = [each.name for each in CASES if each.name in stored["cases"]]
        write_json(STORED, stored)


if __name__ == "__main__":
    main()
