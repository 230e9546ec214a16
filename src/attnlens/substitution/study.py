"""One operator in place of exact attention in every layer of a subject, one at a time and more and more of them.

Three states of the operator: as it is; calibrated, where it has something to fit; matched, its layer's projection
trained for a few steps to give what exact attention gave (`match`). Layers are replaced cumulatively in the order of
their sensitivity, the least sensitive first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlens.analysis.budget import Match, exact_flops, ladder, operator_flops
from attnlens.analysis.declared import is_learned
from attnlens.attention import AbstractAttention, build
from attnlens.models.build import refusal
from attnlens.projection.base import AbstractProjection
from attnlens.substitution.match import Example, match, relative_error
from attnlens.substitution.subject import AbstractSubject, Batch
from attnlens.substitution.swap import counts, residuals, run_from, substituted, with_operator
from attnlens.training.capture import capture


class Options(NamedTuple):
    """How a substitution is measured.

    budget: fraction of exact attention's FLOPs at which an operator with a budget is built.
    steps, learning_rate: of the matching; 0 steps: none.
    seed: of the operators' draws.
    """

    budget: float
    steps: int
    learning_rate: float
    seed: int


def substitute(
    name: str, config: Mapping, subject: AbstractSubject, options: Options, progress: Callable[[str], None] = print
) -> dict[str, Any]:
    """All rows of one operator in one subject: `layers` (one replaced), `cumulative` (the first count of an order).

    Where the operator cannot serve the model, `reason` says why and there are no rows.

    Raises:
        ValueError: options out of range.
    """
    _check(options)
    work = _Work(name, config, subject, options)
    head = {
        "attention": name,
        "family": work.build(0).family,
        "metric": subject.metric,
        "higher_is_better": subject.higher_is_better,
    }
    head |= options._asdict()
    exact = work.exact()
    reason = work.refusal()
    if reason is not None:
        return {**head, "exact": exact, "reason": reason, "argument": None, "layers": [], "cumulative": []}
    layers: list[dict] = []
    cumulative: list[dict] = []
    for state, projections, errors in work.states(progress):
        values = [work.one(layer, projection) for layer, projection in enumerate(projections)]
        layers += [
            {"state": state, "layer": layer, "value": value, "output_error": error}
            for layer, (value, error) in enumerate(zip(values, errors, strict=True))
        ]
        order = sorted(range(len(values)), key=lambda layer: values[layer], reverse=subject.higher_is_better)
        cumulative += [
            {"state": state, "count": count, "layers": sorted(order[:count]), "value": value}
            for count in counts(len(values))
            for value in [work.many({layer: projections[layer] for layer in order[:count]})]
        ]
        progress(f"substitute {name}: {state}, all layers {subject.metric} {cumulative[-1]['value']:.4g}")
    return {**head, "exact": exact, "reason": None, **work.cost(), "layers": layers, "cumulative": cumulative}


class State(NamedTuple):
    """What stands in the layers: the projections, and the root mean square error of each on the fitting batches."""

    name: str
    projections: list[AbstractProjection]
    errors: list[float]


class _Work:
    """What the states share: the exact residuals, the captured queries and keys, the operator's argument."""

    def __init__(self, name: str, config: Mapping, subject: AbstractSubject, options: Options) -> None:
        self.name, self.config, self.subject, self.options = name, config, subject, options
        self.model = subject.model
        self.tested = [residuals(self.model, batch) for batch in subject.test]
        self.fitting = [residuals(self.model, batch) for batch in subject.fit]
        first = subject.fit[0]
        self.captured = capture(self.model, {"input_ids": first.input_ids} | _attention_mask(first))
        q, k, v = (self.captured[f"layer0.{part}"] for part in "qkv")
        self.shape = {"head_dim": q.shape[-1], "num_heads": q.shape[1], "max_length": _longest(subject)}
        self.match = self._budget(q, k, v, first.mask)

    def exact(self) -> float:
        return self._score([states[-1] for states in self.tested], len(self.model.layers))

    def refusal(self) -> str | None:
        operator = self.build(0)
        if operator.arity > 1:
            return f"{self.name} takes {operator.arity} keys for every token, and the trained model has one"
        return refusal(operator, causal=self.model.causal)

    def cost(self) -> dict[str, Any]:
        return {"argument": self.match.argument, "achieved": self.match.achieved, "reachable": self.match.reachable}

    def build(self, layer: int, argument: int | None = None) -> AbstractAttention:
        operator = build(self.config, **self.shape, seed=self.options.seed, layer=layer, **self._override(argument))
        return operator.eval()

    def states(self, progress: Callable[[str], None]) -> Iterator[State]:
        """The states that there are, each when it is asked for."""
        argument = self.match.argument
        operators = [self.build(layer, argument) for layer in range(len(self.model.layers))]
        plain = self._projections(operators)
        yield State("as is", plain, self._errors(plain))
        mask = self.captured.get("key_padding_mask")
        fitted = [
            operator.calibrate(self.captured[f"layer{layer}.q"], self.captured[f"layer{layer}.k"], mask)
            for layer, operator in enumerate(operators)
        ]
        if any(fitted):
            plain = self._projections(operators)
            yield State("calibrated", plain, self._errors(plain))
        if self.options.steps:
            matched = [self._match(layer, projection, progress) for layer, projection in enumerate(plain)]
            yield State("matched", matched, self._errors(matched))

    def one(self, layer: int, projection: AbstractProjection) -> float:
        with substituted(self.model, {layer: projection}):
            return self._score([states[layer] for states in self.tested], layer)

    def many(self, projections: Mapping[int, AbstractProjection]) -> float:
        layer = min(projections)
        with substituted(self.model, projections):
            return self._score([states[layer] for states in self.tested], layer)

    def _score(self, inputs: Sequence[Tensor], layer: int) -> float:
        digests = []
        for place, (x, batch) in enumerate(zip(inputs, self.subject.test, strict=True)):
            digests.append(self.subject.digest(run_from(self.model, x, layer, batch.mask), place))
        return self.subject.score(digests)

    def _projections(self, operators: Sequence[AbstractAttention]) -> list[AbstractProjection]:
        return [
            with_operator(block.projection, operator)
            for block, operator in zip(self.model.layers, operators, strict=True)
        ]

    @torch.no_grad()
    def _examples(self, layer: int) -> list[Example]:
        block, examples = self.model.layers[layer], []
        for batch, states in zip(self.subject.fit, self.fitting, strict=True):
            x = block.before(0, states[layer])
            y = block.projection(x, causal=self.model.causal, key_padding_mask=batch.mask)
            examples.append(Example(x, batch.mask, y))
        return examples

    def _match(self, layer: int, projection: AbstractProjection, progress: Callable[[str], None]) -> AbstractProjection:
        steps, rate = self.options.steps, self.options.learning_rate
        examples = self._examples(layer)
        found = match(projection, examples, causal=self.model.causal, steps=steps, learning_rate=rate)
        progress(
            f"substitute {self.name}: layer {layer}, error {found.before**0.5:.3f}, matched {found.after**0.5:.3f}"
        )
        return found.projection

    def _errors(self, projections: Sequence[AbstractProjection]) -> list[float]:
        causal = self.model.causal
        return [
            relative_error(projection, self._examples(layer), causal=causal) ** 0.5
            for layer, projection in enumerate(projections)
        ]

    def _override(self, argument: int | None) -> dict[str, int]:
        return {} if argument is None or self.budget is None else {self.budget: argument}

    def _budget(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Match:
        operator = build(self.config, **self.shape, seed=self.options.seed).eval()
        self.budget = None if is_learned(operator) else operator.budget
        masks = {"causal": self.model.causal and operator.causal, "key_padding_mask": mask}
        if operator.arity > 1:
            return Match(None, 0, 0.0, True)
        exact = exact_flops(q, k, v, **masks)
        if self.budget is None:
            flops = operator_flops(operator, q, k, v, **masks)
            return Match(None, flops, flops / exact, True)
        (found,) = ladder(lambda argument: self.build(0, argument), q, k, v, **masks, fractions=[self.options.budget])
        return found


def _attention_mask(batch: Batch) -> dict[str, Tensor]:
    return {} if batch.mask is None else {"attention_mask": batch.mask}


def _longest(subject: AbstractSubject) -> int:
    return max(batch.input_ids.shape[1] for batch in (*subject.fit, *subject.test))


def _check(options: Options) -> None:
    if not 0 < options.budget <= 1:
        raise ValueError(f"`budget` must be a fraction in (0, 1] of exact attention's FLOPs, got {options.budget}")
    if options.steps < 0 or options.learning_rate <= 0:
        raise ValueError(
            f"`steps` must be at least 0 and `learning_rate` positive, got {options.steps}, {options.learning_rate}"
        )


def summarize(result: Mapping[str, Any]) -> dict[str, float]:
    """The metric of the exact model and with every layer replaced, by state."""
    last = {row["state"]: row["value"] for row in result["cumulative"]}
    return {"exact": result["exact"], **{f"all layers/{state}": value for state, value in last.items()}}
