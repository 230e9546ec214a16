"""Sequences from a model that continues token by token: greedy, sampled, or the best of a beam.

Everything here needs `step(cache, ids) -> (cache, logits)` only, which `Decoder` and `Seq2Seq` have: prompts of any
length go through one step (the prefill), every further token through one of its own.

Sources: temperature and top-p as in "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2020),
https://arxiv.org/abs/1904.09751; beams with a length penalty as in "Google's Neural Machine Translation System" (Wu et
al., 2016), https://arxiv.org/abs/1609.08144.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree

Step = Callable[[Any, Tensor], tuple[Any, Tensor]]


class Beams(NamedTuple):
    """The hypotheses of a beam search, best first.

    ids: (b, width, n); behind its end token a hypothesis repeats it.
    scores: (b, width), log-probability over length^penalty.
    """

    ids: Tensor
    scores: Tensor


@torch.no_grad()
def generate(
    step: Step,
    cache: Any,
    input_ids: Int[Tensor, "b p"],
    num_tokens: int,
    *,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b n"]:
    """`num_tokens` tokens after the prompt `input_ids`; fewer where every sequence has ended.

    Temperature 0 takes the likeliest token. Behind its `end` token a sequence repeats it.

    Raises:
        ValueError: a number out of its range, or sampling options at temperature 0, where they have no effect.
    """
    _check(num_tokens, input_ids, temperature, top_k, top_p)
    cache, logits = step(cache, input_ids)
    tokens: list[Tensor] = []
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    while True:
        token = _choose(logits[:, -1].float(), temperature, top_k, top_p, generator)
        if end is not None:
            token = torch.where(ended, end, token)
            ended = ended | (token == end)
        tokens.append(token)
        if len(tokens) == num_tokens or bool(ended.all()):
            return torch.stack(tokens, 1)
        cache, logits = step(cache, token[:, None])


@torch.no_grad()
def beam_search(
    step: Step,
    cache: Any,
    input_ids: Int[Tensor, "b p"],
    num_tokens: int,
    *,
    width: int,
    end: int,
    length_penalty: float = 0.0,
) -> Beams:
    """The `width` likeliest sequences that a beam of that width finds; a width of 1 is greedy.

    Args:
        length_penalty: exponent of the length (end token included) by which log-probabilities are divided at the end;
            0 compares them as they are.

    Raises:
        ValueError: a `width` or `num_tokens` below 1.
    """
    _check(num_tokens, input_ids)
    if width < 1:
        raise ValueError(f"`width` must be at least 1, got {width}")
    cache, logits = step(cache, input_ids)
    batch, vocabulary = logits.shape[0], logits.shape[-1]
    # Only the first beam is alive at first, since all are equal.
    scores = torch.full((batch, width), -torch.inf, device=logits.device)
    scores[:, 0] = 0
    rows = torch.arange(batch, device=logits.device)[:, None]
    cache = _select(cache, rows.expand(batch, width).flatten(), batch)
    following = logits[:, -1].float().log_softmax(-1)[:, None].expand(batch, width, vocabulary)
    ids, ended = input_ids.new_empty(batch, width, 0), torch.zeros_like(scores, dtype=torch.bool)
    while True:
        scores, beam, token = _extend(scores, following, ended, end)
        ids = torch.cat([ids[rows, beam], token[..., None]], -1)
        ended = ended[rows, beam] | (token == end)
        if ids.shape[-1] == num_tokens or bool(ended.all()):
            return _ranked(ids, scores, end, length_penalty)
        cache = _select(cache, (rows * width + beam).flatten(), batch * width)
        cache, logits = step(cache, token.flatten()[:, None])
        following = logits[:, -1].float().log_softmax(-1).unflatten(0, (batch, width))


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors of a cache, rows that are reserved and not yet filled left out."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(cache) if isinstance(leaf, Tensor))


def _extend(
    scores: Float[Tensor, "b w"], following: Float[Tensor, "b w c"], ended: Tensor, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best w continuations: their scores, the beams they continue and their tokens."""
    vocabulary = following.shape[-1]
    only_end = torch.full_like(following[0, 0], -torch.inf)
    only_end[end] = 0
    total = scores[..., None] + torch.where(ended[..., None], only_end, following)
    best, place = total.flatten(1).topk(scores.shape[1])
    return best, place // vocabulary, place % vocabulary


def _ranked(ids: Tensor, scores: Tensor, end: int, length_penalty: float) -> Beams:
    lengths = (ids != end).sum(-1) + (ids == end).any(-1)
    scores = scores / lengths**length_penalty
    order = scores.argsort(-1, descending=True)
    return Beams(ids.gather(1, order[..., None].expand_as(ids)), scores.gather(1, order))


def _select(cache: Any, rows: Int[Tensor, " r"], batch: int) -> Any:
    """The cache of other rows of the batch; every tensor in it has the batch first."""

    def pick(leaf: Tensor) -> Tensor:
        assert leaf.shape[0] == batch, "tensors of a cache have the batch as their first axis"
        return leaf.index_select(0, rows)

    return pytree.tree_map_only(Tensor, pick, cache)


def _choose(
    logits: Float[Tensor, "b c"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " b"]:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, places = logits.softmax(-1).sort(-1, descending=True)
        # A token stays while those before it hold less than top_p: the likeliest always does.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        dropped = torch.zeros_like(beyond).scatter(-1, places, beyond)
        logits = logits.masked_fill(dropped, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(
    num_tokens: int,
    input_ids: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    if num_tokens < 1:
        raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}")
    if input_ids.shape[1] < 1:
        raise ValueError("`input_ids` is empty: begin with a token, such as that of the beginning of a sequence")
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 (the likeliest token) or more, got {temperature}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("`top_k` and `top_p` have no effect at `temperature` 0: give a positive temperature")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}")
