"""BigBird against BigBirdBlockSparseAttention of transformers, given the random blocks that it drew.

The oracle's global blocks are the first and the last, the operator's the first ones. With a last block of padding the
two coincide; without it they differ by that block alone. The oracle draws in training mode only: in evaluation every
"random" block is the first one, which then counts 1 + num_random times.
"""

import numpy as np
import pytest
import torch

from attnlens.attention.bigbird import BigBird
from attnlens.testing.inputs import HEAD_DIM, gaussian
from tests.oracles.feed import EXACT, HEADS, assert_agree, feed, leaves, optional, real_tokens, split_heads

# Length, block size, random blocks r. With 5 + r blocks a row has r to choose from; with more than 5 + 2 r the oracle
# chooses among the first 5 + 2 r; in between its plan asks for more blocks than are eligible.
CASES = [(18, 2, 1), (24, 3, 3), (26, 2, 2), (60, 3, 2), (40, 4, 5), (64, 4, 3)]


def bigbird_module(q, k, v, mask, block_size, num_random):
    """The module's output, its matrix and the blocks (head, row of blocks from the second to the last but one, r)."""
    module = optional("transformers.models.big_bird.modeling_big_bird")
    config = module.BigBirdConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, block_size=block_size, num_random_blocks=num_random
    )
    layer = module.BigBirdBlockSparseAttention(config, seed=3).train()
    hidden = feed(layer, query=q, key=k, value=v)
    blocked, band, rows, columns = module.BigBirdModel.create_masks_for_block_sparse_attn(mask.to(q), block_size)
    drawn = []
    draw = layer._bigbird_block_rand_mask_with_head
    layer._bigbird_block_rand_mask_with_head = lambda **plan: drawn.extend(draw(**plan)) or drawn
    state = np.random.get_state()
    try:
        out, weights = layer(hidden, band, rows, columns, blocked, blocked)
    finally:
        np.random.set_state(state)
    return split_heads(out), weights, np.stack(drawn)


def with_blocks(drawn, block_size, num_blocks, num_random, length):
    """The operator whose draws choose these blocks, where `num_blocks` hold real tokens.

    Its draws rank a row's eligible blocks and are corrected where they repeat themselves; ascending ranks never do.
    """
    operator = BigBird(block_size, HEADS, length, seed=0, num_global=1, num_random=num_random)
    for head, of_head in enumerate(drawn):
        for row, blocks in enumerate(of_head, start=1):
            others = [block for block in range(1, num_blocks) if abs(block - row) > 1]
            operator.draws[head, row] = torch.tensor(sorted(others.index(block) for block in blocks))
    return operator


@pytest.mark.parametrize(("length", "block_size", "num_random"), CASES)
def test_a_padded_last_block_makes_it_that_of_transformers(length, block_size, num_random):
    inputs = leaves(length)
    real = length - block_size
    mask = real_tokens(length, real, real - block_size + 1)
    expected, _, drawn = bigbird_module(*inputs, mask, block_size, num_random)
    operator = with_blocks(drawn, block_size, length // block_size - 1, num_random, length)
    found = operator(*inputs, key_padding_mask=mask)
    assert_agree(found, expected, EXACT, inputs=inputs, mask=mask)
    # The same without the padded block, whose number of blocks is then the real one: lengths odd and even.
    found = operator(*(x[:, :, :real] for x in inputs), key_padding_mask=mask[:, :real])
    assert_agree(found, expected[:, :, :real], EXACT, mask=mask[:, :real])


@pytest.mark.parametrize(("length", "block_size", "num_random"), CASES)
def test_without_padding_they_differ_by_the_global_last_block(length, block_size, num_random):
    """The documented departure: the last block moves with the length, so it is not global here."""
    q, k, v = gaussian(length)
    everything = torch.ones(2, length, dtype=torch.bool)
    _, weights, drawn = bigbird_module(q, k, v, everything, block_size, num_random)
    operator = with_blocks(drawn, block_size, length // block_size, num_random, length)
    expected = operator.matrix(q, k) > 0
    expected[..., -block_size:] = True
    expected[..., -block_size:, :] = True
    assert torch.equal(weights > 0, expected)
