"""Declarations come from the classes that conf/attention names."""

from pathlib import Path

from attnlens.attention.softmax import Softmax
from attnlens.report.methods import declared

CONF = Path(__file__).parents[2] / "conf/attention"


def test_declarations_are_those_of_the_class():
    softmax, random_keys = declared(CONF, ["softmax", "random_keys"])
    assert (softmax.family, softmax.causal, softmax.order) == (Softmax.family, Softmax.causal, Softmax.order)
    assert softmax.arguments == ""
    assert random_keys.budget == "num_keys"
    assert random_keys.arguments.startswith("num_keys=")
    assert softmax.summary
    assert "\n" not in softmax.summary


def test_a_nested_operator_is_named_by_its_class(tmp_path):
    text = "_target_: attnlens.attention.softmax.Softmax\ninner:\n  _target_: a.b.Inner\n  steps: 6\nsize: 3\n"
    (tmp_path / "nested.yaml").write_text(text)
    (nested,) = declared(tmp_path, ["nested"])
    assert nested.arguments == "inner=Inner(steps=6), size=3"
