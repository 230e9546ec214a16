"""Declarations travel from the class through the results to the page."""

from attnlens.analysis.declared import arguments, declarations
from attnlens.attention.random_keys import RandomKeys
from attnlens.report.methods import methods_of


def test_declarations_are_those_of_the_class():
    config = {"_target_": "attnlens.attention.random_keys.RandomKeys", "num_keys": 3}
    found = declarations(config, RandomKeys(num_keys=3, max_length=8, seed=0))
    (method,) = methods_of({"random_keys": {"declared": found}}, {"random_keys": {"slope": None}})
    assert (method.family, method.causal, method.order) == (RandomKeys.family, RandomKeys.causal, RandomKeys.order)
    assert method.budget == "num_keys"
    assert method.arguments == "num_keys=3"
    assert method.summary
    assert "\n" not in method.summary


def test_a_nested_part_is_named_by_its_class():
    config = {"_target_": "x.Y", "inner": {"_target_": "a.b.Inner", "steps": 6}, "size": 3}
    assert arguments(config) == "inner=Inner(steps=6), size=3"
