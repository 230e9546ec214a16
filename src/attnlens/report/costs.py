"""The tables of docs/costs.md, generated from conf/sizes and conf/projection.

    python -m attnlens.report.costs

Formulas are those of `projection.cost`; counts are of built layers, see `analysis.costs`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlens.analysis.costs import Dense, counted, counted_products
from attnlens.construct import construct
from attnlens.files import atomic
from attnlens.projection.base import AbstractProjection
from attnlens.projection.cost import Cost, Shape
from attnlens.projection.factored import AbstractFactored
from attnlens.projection.mla import Mla, merged_attention
from attnlens.projection.multihead import AbstractMultiHead
from attnlens.report.readme import fill, table

MODELS = ("llama3_70b", "gemma3_27b", "deepseek_v2")
BYTES = 2  # of a float in the caches of models of this size


class Candidate(NamedTuple):
    """One line of the comparison: its name, class, options of the constructor, and shape."""

    name: str
    kind: type[AbstractProjection]
    options: Mapping[str, Any]
    shape: Shape


def comparison_table(sizes: Mapping[str, Any], candidates: Sequence[Candidate]) -> str:
    """A prompt of every projection: its operations by formula, and what a built layer counts."""
    head = ["projection", "queries, keys, values", "scores", "outputs", "final", "sum", "counted"]
    head += ["cache", "held", "weights", "parameters"]
    rows = []
    for each in candidates:
        said, found = (
            each.kind.cost(each.shape, each.options, new=sizes["length"]),
            counted(_built(each), _tokens(sizes)),
        )
        operations = (said.maps, said.scores, said.means, said.final, said.products, found.products)
        floats = (said.cache, found.cache, said.weights, found.weights)
        rows.append(
            [f"`{each.name}`", *(_millions(value) for value in operations), *(_exact(value) for value in floats)]
        )
    return table(head, rows)


def decoding_table(sizes: Mapping[str, Any], candidates: Sequence[Candidate]) -> str:
    """One more token over a full cache: multiply-adds of both forms, and floats that attention reads."""
    head = ["projection", "expanded", "compressed", "ratio", "floats read from the cache", "of `mha`"]
    full = next(each for each in candidates if each.name == "mha")
    most = full.kind.cost(full.shape, full.options, new=1, past=sizes["cached"]).cache
    rows = []
    for each in candidates:
        expanded = each.kind.cost(each.shape, each.options, new=1, past=sizes["cached"])
        cells, read = [_millions(expanded.products), "–", "–"], expanded.cache * (sizes["cached"] + 1)
        if issubclass(each.kind, AbstractFactored):
            compressed = each.kind.compressed_cost(each.shape, each.options, new=1, past=sizes["cached"])
            cells[1:] = [_millions(compressed.products), f"{expanded.products / compressed.products:.1f}"]
        rows.append([f"`{each.name}`", *cells, _exact(read), f"{100 * expanded.cache / most:.1f} %"])
    return table(head, rows)


def heads_table(candidates: Sequence[Candidate]) -> str:
    """A's table of head counts."""
    head = ["projection", "query heads", "key/value heads", "width of a head", "cache a token"]
    rows = []
    for each in candidates:
        if issubclass(each.kind, AbstractMultiHead):
            heads, groups = each.shape.num_heads, each.options.get("num_groups", each.shape.num_heads)
            cached = each.kind.cost(each.shape, each.options, new=1).cache
            rows.append([f"`{each.name}`", str(heads), str(groups), str(each.shape.head_dim), _exact(cached)])
    return table(head, rows)


def latent_table(sizes: Mapping[str, Any], candidates: Sequence[Candidate]) -> str:
    """A's table of latent attention: its three forms on a prompt, without rotated columns and with d_LQ = d_L."""
    mla = next(each for each in candidates if each.name == "mla")
    plain = {**mla.options, "rotary_dim": 0, "query_rank": mla.options["rank"]}
    layer, x = _built(mla._replace(options=plain)), _tokens(sizes)
    assert isinstance(layer, Mla), "the file of that name"
    merged = layer.merged()
    forms: dict[str, tuple[Callable[..., Cost], Callable[[Tensor], Tensor]]] = {
        "expanded": (Mla.cost, lambda x: layer(x)),
        "compressed": (
            Mla.compressed_cost,
            lambda x: layer.merge(layer.attend_compressed(layer.query(x), layer.keep(x))),
        ),
        "merged": (
            Mla.merged_cost,
            lambda x: merged_attention(merged, x, layer.latent_query(x), layer.scale),
        ),
    }
    rows = []
    for name, (formula, run) in forms.items():
        said = formula(mla.shape, plain, new=sizes["length"])
        operations = (said.maps, said.scores, said.means, said.final, said.products, counted_products(run, x))
        rows.append([name, *(_millions(value) for value in operations), _exact(said.weights)])
    head = ["form", "to latents (and heads)", "scores", "outputs", "final", "sum", "counted", "weights"]
    return table(head, rows)


def grouped_memory_table(models: Sequence[Mapping[str, Any]]) -> str:
    """B's table of what multi-head and grouped-query attention store in a layer, at full context."""
    models = [model for model in models if "num_groups" in model["projection"]]
    sizes = [(model["context"], model["projection"]["num_groups"], _model(model)[2]) for model in models]
    tensors: dict[str, Callable[[int, int, Shape], int]] = {
        "K | N_KV × d_head × G": lambda n, groups, shape: n * groups * shape.head_dim,
        "V | N_KV × d_head × G": lambda n, groups, shape: n * groups * shape.head_dim,
        "W^Q | d × d_head × H": lambda n, groups, shape: shape.width * shape.head_dim * shape.num_heads,
        "W^K | d × d_head × G": lambda n, groups, shape: shape.width * shape.head_dim * groups,
        "W^V | d × d_head × G": lambda n, groups, shape: shape.width * shape.head_dim * groups,
        "W^O | H d_head × d": lambda n, groups, shape: shape.num_heads * shape.head_dim * shape.width,
    }
    return _memory_table(models, {name: [size(*each) for each in sizes] for name, size in tensors.items()})


def latent_memory_table(models: Sequence[Mapping[str, Any]]) -> str:
    """B's table of what latent attention stores in a layer at full context: merged, as it has it, without rotation."""
    models = [model for model in models if "rank" in model["projection"]]
    sizes = [(model["context"], model["projection"]["rank"], _model(model)[2]) for model in models]
    tensors: dict[str, Callable[[int, int, Shape], int]] = {
        "L | N_KV × d_L": lambda n, rank, shape: n * rank,
        "W^L | d × d_L": lambda n, rank, shape: shape.width * rank,
        "W^Q' | d × d_L × H": lambda n, rank, shape: shape.width * rank * shape.num_heads,
        "W^O' | H d_L × d": lambda n, rank, shape: shape.num_heads * rank * shape.width,
    }
    return _memory_table(models, {name: [size(*each) for each in sizes] for name, size in tensors.items()})


def _memory_table(models: Sequence[Mapping[str, Any]], tensors: Mapping[str, Sequence[int]]) -> str:
    """Floats of every tensor, their sum, and the same by `cost` with the maps as they are stored."""
    rows = [[*name.split(" | "), *(_exact(value) for value in values)] for name, values in tensors.items()]
    totals = [sum(values) for values in zip(*tensors.values(), strict=True)]
    rows.append(["all", "", *(_exact(value) for value in totals)])
    costs = [(model["context"], _model(model)[3]) for model in models]
    rows.append(["as we store it", "", *(_exact(n * said.cache + said.weights) for n, said in costs)])
    return table(["tensor", "size", *(f"{model['title']}, floats" for model in models)], rows)


def model_table(models: Sequence[Mapping[str, Any]]) -> str:
    """B's table of model sizes, with what they cache in all layers."""
    head = ["model", "layers", "heads", "key/value heads", "width", "d_head", "cache a token", "at full context"]
    head += ["multi-head would be"]
    rows = []
    for model in models:
        _, options, shape, said = _model(model)
        layers, context = model["num_layers"], model["context"]
        groups = options.get("num_groups", f"– (d_L {options.get('rank')}, d_R {options.get('rotary_dim')})")
        bytes_ = BYTES * layers * said.cache
        many = 2 * shape.num_heads * shape.head_dim / said.cache
        sizes = [str(layers), str(shape.num_heads), str(groups), _exact(shape.width), str(shape.head_dim)]
        held = f"{bytes_ * context / 1e9:.1f} GB of {context // 1024}k"
        rows.append([model["title"], *sizes, f"{_exact(bytes_)} B", held, f"{many:.1f} times as much"])
    return table(head, rows)


def candidates(sizes: Mapping[str, Any], folder: Path) -> list[Candidate]:
    """The lines of conf/sizes/comparison.yaml, with the files of conf/projection under them."""
    from hydra.utils import get_class

    found = []
    for name, changes in sizes["projections"].items():
        given = {**_load(folder / f"{changes['file']}.yaml"), **changes}
        heads = given.pop("num_heads", sizes["num_heads"])
        options = {key: value for key, value in given.items() if key not in ("_target_", "file")}
        shape = Shape(sizes["width"], heads, sizes["width"] // heads)
        found.append(Candidate(name, get_class(given["_target_"]), options, shape))
    return found


def _built(candidate: Candidate) -> AbstractProjection:
    kind, shape = candidate.kind, candidate.shape
    target = {"_target_": f"{kind.__module__}.{kind.__name__}", **candidate.options}
    parts = {"attention": Dense(), "width": shape.width, "num_heads": shape.num_heads, "position": None}
    return construct(target, parts)


def _tokens(sizes: Mapping[str, Any]) -> Tensor:
    return torch.randn(1, sizes["length"], sizes["width"], generator=torch.Generator().manual_seed(0))


def blocks(root: Path) -> dict[str, str]:
    """All tables, from conf/ under `root`."""
    sizes = _load(root / "conf/sizes/comparison.yaml")
    lines = candidates(sizes, root / "conf/projection")
    models = [_load(root / f"conf/sizes/{name}.yaml") for name in MODELS]
    return {
        "comparison": comparison_table(sizes, lines),
        "decoding": decoding_table(sizes, lines),
        "heads": heads_table(lines),
        "latent": latent_table(sizes, lines),
        "grouped memory": grouped_memory_table(models),
        "latent memory": latent_memory_table(models),
        "models": model_table(models),
    }


def _model(model: Mapping[str, Any]) -> tuple[type[AbstractProjection], Mapping[str, Any], Shape, Cost]:
    from hydra.utils import get_class

    kind = get_class(model["projection"]["_target_"])
    options = {name: value for name, value in model["projection"].items() if name != "_target_"}
    shape = Shape(model["width"], model["num_heads"], model["head_dim"])
    return kind, options, shape, kind.cost(shape, options, new=1)


def _load(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _millions(value: int) -> str:
    return f"{value / 1e6:.2f}"


def _exact(value: int) -> str:
    return f"{value:,}"


def main() -> None:
    """Rewrite docs/costs.md of the current folder."""
    path = Path("docs/costs.md")
    text = fill(path.read_text(encoding="utf-8"), blocks(Path.cwd()), "docs/costs.md")
    with atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
