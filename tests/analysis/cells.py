"""Trained cells on disk in the pipeline's format, made of random tensors: no model is trained."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from attnlens.files import write_json
from attnlens.study import Study

STUDY = Study((), ("mqar", "shakespeare"), ("softmax", "toy"), "mha", 2, (0.0625, 0.125, 0.25, 0.5), "softmax")
CAUSAL = {"mqar": False, "shakespeare": True}
BATCH, HEADS, LENGTH, DIM, LAYERS = 4, 2, 64, 32, 2


def qkv(seed, causal, length=LENGTH, padded=False):
    """Tensors of a capture: queries and keys share directions, so that attention is neither flat nor diagonal."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        q, k, v, common = torch.randn(4, BATCH, HEADS, length, DIM, generator=generator)
        tensors |= {f"layer{layer}.q": q + common, f"layer{layer}.k": k + common, f"layer{layer}.v": v + 0.3}
    if padded:
        lengths = torch.tensor([length, length - 7, length // 2, 3])
        tensors["key_padding_mask"] = torch.arange(length) < lengths[:, None]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_cell(root: Path, attention, data, *, causal, seeds=2, padded=False, weights=None, scores=None):
    """Write models/<attention>/<data> with captures, weights and scores (a list of arrays, one a seed)."""
    folder = root / "models" / attention / data
    cell = {"status": "ok", "reason": None, "attention": attention, "data": data, "seeds": list(range(seeds))}
    write_json(folder / "cell.json", cell | {"parameters": 1})
    for seed in range(seeds):
        target = folder / f"seed{seed}"
        target.mkdir()
        salt = sum(map(ord, attention + data)) * 10 + seed
        metadata = {"causal": str(causal).lower()}
        save_file(qkv(salt, causal, padded=padded), target / "qkv.safetensors", metadata=metadata)
        save_file(weights or {"head.weight": torch.zeros(1)}, target / "model.safetensors")
        values = np.asarray(scores[seed] if scores else [0.5, 1.0])
        np.save(target / "scores.npy", values)
        higher = not data.startswith("shakespeare")
        metric = {"metric": "accuracy" if higher else "bits_per_character", "higher_is_better": higher}
        write_json(target / "metrics.json", metric | {"value": float(values.mean()), "slices": {}, "steps": 1})


def write_refusal(root: Path, attention, data, reason):
    cell = {"status": "not_applicable", "reason": reason, "attention": attention, "data": data, "seeds": []}
    write_json(root / "models" / attention / data / "cell.json", cell | {"parameters": 0})
