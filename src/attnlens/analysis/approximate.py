"""One cell of the study: how well an operator approximates exact attention on captured queries, keys and values.

Every row is one (data, source, seed, layer, head, budget). A source is the Q, K, V that a model computed on test
inputs: `own`, the model trained with this operator, or `reference`, the model of the study's reference method.
docs/measures.md defines the numbers.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from attnlens.analysis.budget import Match, exact_flops, ladder, operator_flops
from attnlens.analysis.capture import Capture, read_captures
from attnlens.analysis.declared import declarations, is_learned, is_randomized
from attnlens.analysis.measure import measure
from attnlens.attention import AbstractAttention, build
from attnlens.study import Study, read_cell, seed_file


class Cell(NamedTuple):
    """The operator of a cell: its name, its config, the study it is part of, where the study's files are.

    `draws`: how many seeds a randomized operator is averaged over.
    """

    attention: str
    config: Mapping
    study: Study
    root: Path
    draws: int


class Place(NamedTuple):
    """Where a row belongs: which model's Q, K, V (`labels` of the source) on which data, and the weights to load."""

    data: str
    seed: int
    labels: tuple[str, ...]
    weights: Mapping[str, Tensor] | None


def approximate(cell: Cell, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """All rows of one operator, as results/approximate/<attention>.json holds them.

    Raises:
        ValueError: a model that the study lists has not been trained, or `draws` is not positive.
    """
    if cell.draws < 1:
        raise ValueError(f"`draws` must be at least 1, got {cell.draws}: set analysis.draws")
    rows: list[dict] = []
    trained: list[dict] = []
    refused: list[dict] = []
    matches: dict[tuple, list[tuple[float | None, Match]]] = {}
    operator = None
    for data in cell.study.data:
        own = read_cell(cell.root, cell.attention, data)
        for seed in range(cell.study.seeds):
            captures = _read(cell, cell.study.reference, data, seed)
            operator = _build(cell, captures[0])
            if captures[0].causal and not operator.causal:
                refused.append({"data": data, "reason": own.get("reason") or f"{cell.attention} cannot be causal"})
                break
            if not operator.pairwise:
                refused.append(
                    {"data": data, "reason": f"{cell.attention} has no matrix of queries by keys to compare"}
                )
                break
            progress(f"approximate {cell.attention}: {data}, seed {seed}")
            for place, layers in _sources(cell, operator, own, data, seed, captures):
                for capture in layers:
                    rows += _rows(cell, operator, place, capture, matches)
                    trained += _as_trained(cell, operator, place, capture)
    assert operator is not None, "a study has at least one data set and one seed"
    return {
        "attention": cell.attention,
        "family": operator.family,
        "target": operator.target,
        "declared": declarations(cell.config, operator),
        "budget_argument": None if is_learned(operator) else operator.budget,
        "rows": rows,
        "trained": trained,
        "not_applicable": refused,
    }


def summarize(result: Mapping[str, Any]) -> dict[str, float]:
    """Mean error over seeds, layers and heads, by data set, source and budget: `mqar/own/0.25/error`."""
    groups: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["error"] is not None:
            groups.setdefault(f"{row['data']}/{row['source']}/{row['budget']}/error", []).append(row["error"])
    return {name: statistics.fmean(values) for name, values in groups.items()}


def _build(cell: Cell, capture: Capture, seed: int = 0, **overrides: object) -> AbstractAttention:
    _, heads, length, dim = capture.q.shape
    operator = build(
        cell.config, head_dim=dim, num_heads=heads, max_length=length, seed=seed, layer=capture.layer, **overrides
    )
    return operator.eval()


def _read(cell: Cell, attention: str, data: str, seed: int) -> list[Capture]:
    return read_captures(seed_file(cell.root, attention, data, seed, "qkv.safetensors"))


def _sources(
    cell: Cell, operator: AbstractAttention, own: Mapping, data: str, seed: int, reference: list[Capture]
) -> Iterator[tuple[Place, list[Capture]]]:
    """The captured layers of the reference model and of the operator's own; one and the same is measured once."""
    if own["status"] != "ok":
        yield Place(data, seed, ("reference",), None), reference
        return
    weights = _weights(cell, data, seed)
    if cell.attention == cell.study.reference:
        yield Place(data, seed, ("own", "reference"), weights), reference
        return
    yield Place(data, seed, ("own",), weights), _read(cell, cell.attention, data, seed)
    # A learned operator brings the weights of its own model to the reference model's Q, K, V as well.
    yield Place(data, seed, ("reference",), weights if is_learned(operator) else None), reference


def _weights(cell: Cell, data: str, seed: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(seed_file(cell.root, cell.attention, data, seed, "model.safetensors"))


def load_weights(operator: AbstractAttention, weights: Mapping[str, Tensor], layer: int) -> AbstractAttention:
    """Put the trained parameters and the draws of one layer into `operator`.

    They stand in model.safetensors under `blocks.<layer>.projection.attention.<name>`.

    Raises:
        ValueError: the file lacks one of the operator's parameters.
    """
    prefix = f"blocks.{layer}.projection.attention."
    state = {name.partition(prefix)[2]: tensor for name, tensor in weights.items() if prefix in name}
    missing = sorted({name for name, _ in operator.named_parameters()} - set(state))
    if missing:
        raise ValueError(f"model.safetensors lacks {prefix}{missing}: train the cell anew with `dvc repro -f train`")
    operator.load_state_dict(state, strict=False)
    return operator


def _rows(cell: Cell, operator: AbstractAttention, place: Place, capture: Capture, matches: dict) -> Iterator[dict]:
    """Rows of the whole ladder on one layer."""
    shape = (*capture.q.shape, capture.v.shape[-1], capture.causal)
    if shape not in matches:
        matches[shape] = _match(cell, operator, capture)
    exact = exact_flops(*capture.inputs, **capture.masks)
    learned = is_learned(operator)
    for budget, match in matches[shape]:
        argument = {} if operator.budget is None or match.argument is None else {operator.budget: match.argument}
        seeds = range(cell.draws) if is_randomized(operator) and not learned else range(1)
        draws = [_build(cell, capture, seed=seed, **argument) for seed in seeds]
        if learned and place.weights is not None:
            load_weights(draws[0], place.weights, capture.layer)
        yield from _labelled(place, capture, budget, argument, match, exact, measure(draws, capture, match.flops))


def _as_trained(cell: Cell, operator: AbstractAttention, place: Place, capture: Capture) -> Iterator[dict]:
    """Rows of the operator exactly as its own model used it: trained argument, trained weights, that run's draw."""
    if place.weights is None or "own" not in place.labels:
        return
    used = load_weights(_build(cell, capture, seed=place.seed), place.weights, capture.layer)
    flops, exact = operator_flops(used, *capture.inputs, **capture.masks), exact_flops(*capture.inputs, **capture.masks)
    name = operator.budget
    argument = {name: cell.config[name]} if name is not None and name in cell.config else {}
    match = Match(None, flops, flops / exact, True)
    own = place._replace(labels=("own",))
    yield from _labelled(own, capture, None, argument, match, exact, measure([used], capture, flops))


def _match(cell: Cell, operator: AbstractAttention, capture: Capture) -> list[tuple[float | None, Match]]:
    """The ladder of budgets for these shapes; one entry without a budget for an operator that has none to choose."""
    name = operator.budget
    if name is None or is_learned(operator):
        flops = operator_flops(operator, *capture.inputs, **capture.masks)
        return [(None, Match(None, flops, flops / exact_flops(*capture.inputs, **capture.masks), True))]

    def construct(argument: int) -> AbstractAttention:
        return _build(cell, capture, **{name: argument})

    found = ladder(construct, *capture.inputs, **capture.masks, fractions=cell.study.budgets)
    return list(zip(cell.study.budgets, found, strict=True))


def _labelled(
    place: Place,
    capture: Capture,
    budget: float | None,
    argument: Mapping[str, object],
    match: Match,
    exact: int,
    heads: Sequence[Mapping[str, float | int | None]],
) -> Iterator[dict]:
    """One row a label and head: where it belongs, what it cost, what was measured."""
    cost = {"flops": match.flops, "exact_flops": exact, "achieved": match.achieved, "reachable": match.reachable}
    for label in place.labels:
        where = {"data": place.data, "source": label, "seed": place.seed, "layer": capture.layer}
        for head, measured in enumerate(heads):
            key = {"head": head, "causal": capture.causal, "budget": budget, "argument": dict(argument)}
            yield {**where, **key, **cost, **measured}
