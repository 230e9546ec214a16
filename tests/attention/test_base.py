"""What every operator refuses, and the words it uses."""

import pytest
import torch
from jaxtyping import TypeCheckError

from attnlens.attention.mean import Mean
from attnlens.attention.softmax import Softmax

Q = torch.randn(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("q", "k", "v", "kwargs"),
    [
        (Q[0], Q[0], Q[0], {}),
        (Q, Q[:, :1], Q[:, :1], {}),
        (Q, Q, Q[:, :, :4], {}),
        (Q, Q, Q, {"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}),
        (Q[:, :, :3], Q, Q, {"causal": True}),
        (Q[:, :, :0], Q[:, :, :0], Q[:, :, :0], {}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v, kwargs):
    # The test run's shape checks may speak first; a user's run meets the ValueError.
    with pytest.raises((ValueError, TypeCheckError)):
        Softmax()(q, k, v, **kwargs)
    with pytest.raises(ValueError):
        Softmax()._check(q, k, v, kwargs.get("causal", False), kwargs.get("key_padding_mask"))


def test_half_precision_is_computed_in_single():
    q = Q.bfloat16()
    single = Mean()(q.float(), q.float(), q.float())
    half = Mean()(q, q, q)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, single.bfloat16())


def test_matrix_of_softmax_is_its_weights():
    from attnlens.attention.softmax import softmax_weights

    q, k = Q.double(), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(Softmax().matrix(q, k), softmax_weights(q, k), rtol=0, atol=1e-12)
