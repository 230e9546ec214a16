"""One way to build: what is passed, what is refused, and with which words."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from attnlens.attention import AbstractAttention, build
from attnlens.attention.build import derived_seed
from attnlens.attention.random_keys import RandomKeys
from attnlens.construct import construct

DIMS = {"head_dim": 8, "num_heads": 2, "max_length": 32}


class Wrapper(AbstractAttention):
    """An operator around an operator, as a preselection is."""

    family = "test"

    def __init__(self, inner: AbstractAttention, sizes: list, head_dim: int, seed: int) -> None:
        super().__init__()
        self.inner, self.sizes, self.head_dim, self.seed = inner, sizes, head_dim, seed

    def attend(self, q, k, v, *, causal, key_padding_mask):
        return self.inner(q, k, v, causal=causal, key_padding_mask=key_padding_mask)


def config(**more):
    return OmegaConf.create({"_target_": "attnlens.attention.random_keys.RandomKeys", "num_keys": 4, **more})


def wrapped():
    return OmegaConf.create({"_target_": f"{__name__}.Wrapper", "inner": config(), "sizes": [1, 2]})


def test_dimensions_and_overrides_arrive():
    operator = build(config(), **DIMS, num_keys=7)
    assert isinstance(operator, RandomKeys)
    assert operator.num_keys == 7
    assert operator.uniform.shape == (32,)


def test_nested_operators_receive_dimensions_and_a_seed_of_their_own():
    operator = build(wrapped(), **DIMS, seed=5, layer=1)
    assert operator.head_dim == 8
    assert operator.inner.uniform.shape == (32,)
    assert operator.seed == derived_seed(5, 1)
    generator = torch.Generator().manual_seed(derived_seed(5, 1, ("inner",)))
    assert torch.equal(operator.inner.uniform, torch.rand(32, generator=generator))
    assert derived_seed(5, 1, ("inner",)) != derived_seed(5, 1)


def test_layers_and_seeds_differ_and_runs_repeat():
    draws = {(s, i): build(config(), **DIMS, seed=s, layer=i).uniform for s in (0, 1) for i in (0, 1)}
    assert len({tuple(x.tolist()) for x in draws.values()}) == 4
    assert torch.equal(draws[1, 1], build(config(), **DIMS, seed=1, layer=1).uniform)


def test_lists_become_plain_lists():
    assert type(build(wrapped(), **DIMS).sizes) is list


def test_unknown_keyword_lists_what_is_valid():
    with pytest.raises(ValueError, match=r"`num_key` is not an argument of RandomKeys; valid: \['num_keys'\]"):
        build(config(), **DIMS, num_key=3)
    with pytest.raises(ValueError, match="`typo` is not an argument"):
        build(config(typo=1), **DIMS)


def test_a_class_without_arguments_names_none():
    """torch's Module takes `*args, **kwargs`, which an operator without a constructor of its own inherits."""
    with pytest.raises(ValueError, match=r"`size` is not an argument of Mean; valid: \[\]"):
        build({"_target_": "attnlens.attention.mean.Mean", "size": 3}, **DIMS)


@pytest.mark.parametrize("name", ["head_dim", "num_heads", "max_length", "seed"])
def test_a_dimension_written_in_a_yaml_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` is passed by the caller.*valid: \['num_keys'\]"):
        build(config(**{name: 3}), **DIMS)


def test_partial_and_a_missing_target_are_refused():
    with pytest.raises(ValueError, match="`_partial_` is not an argument"):
        build(config(_partial_=True), **DIMS)
    with pytest.raises(ValueError, match="`_target_` is missing"):
        build({"num_keys": 3}, **DIMS)


def test_a_nested_mistake_is_found_too():
    bad = wrapped()
    bad.inner.num_key = 3
    with pytest.raises(ValueError, match="`num_key` is not an argument of RandomKeys"):
        build(bad, **DIMS)


def test_what_is_not_an_operator_is_refused():
    with pytest.raises(ValueError, match="must name an AbstractAttention, got Identity"):
        build({"_target_": "torch.nn.Identity"}, **DIMS)
    assert isinstance(construct({"_target_": "torch.nn.Identity"}), nn.Identity)


def test_a_bad_value_names_argument_and_value():
    with pytest.raises(ValueError, match="`num_keys` must be at least 1, got 0"):
        build(config(), **DIMS, num_keys=0)
