"""The example of docs/interoperability.md runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs" / "interoperability.md"


def test_the_example_of_the_docs_runs():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[oracles]'")
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert "attnlens:performer" in names["names"]
    assert names["model"].model.layers[0].self_attn.attnlens_hedgehog.training
    learned = [weight.grad for name, weight in names["model"].named_parameters() if "attnlens_" in name]
    assert learned
    assert all(grad is not None and grad.abs().max() > 0 for grad in learned)
    assert names["model"](names["ids"]).logits.isfinite().all()
