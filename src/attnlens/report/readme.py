"""README's tables, generated: the study's headline numbers, the shelf of operators, the benchmark.

    python -m attnlens.report.readme

The text between `<!-- name -->` and `<!-- /name -->` is replaced; the rest of README.md is left as it is.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnlens.files import atomic, read_json
from attnlens.report.benchmark import benchmark_table

NAMES = {"accuracy": "accuracy", "bits_per_character": "bits/char"}


def study_table(summary: Mapping[str, Mapping[str, Mapping[str, float | str]]], methods: Sequence[str]) -> str:
    """Score and error of every method on every data set, from results/summary.json."""
    head, lines = ["method"], []
    for data, rows in summary.items():
        metric = next(key for row in rows.values() for key in row if key in NAMES)
        head += [f"`{data}` {NAMES[metric]}", "error"]
    for method in methods:
        cells = [f"`{method}`"]
        for rows in summary.values():
            row = rows[method]
            score = next((row[key] for key in row if key in NAMES), None)
            cells += [_number(score), _number(row.get("error_reference"))]
        lines.append(cells)
    return table(head, lines)


def operator_table(declared: Mapping[str, Mapping[str, object]]) -> str:
    """One line an operator, grouped by family."""
    rows = [
        [
            str(facts["family"]),
            f"`{name}`",
            str(facts["summary"]).rstrip("."),
            f"`{facts['budget']}`" if facts["budget"] else "–",
            "yes" if facts["causal"] else "no",
        ]
        for name, facts in sorted(declared.items(), key=lambda item: (str(item[1]["family"]), item[0]))
    ]
    return table(["family", "method", "what it does", "budget", "causal"], rows)


def declared_on_the_shelf(folder: Path) -> dict[str, dict[str, object]]:
    """The declarations of every operator of conf/attention."""
    import yaml

    from attnlens.analysis.declared import declarations
    from attnlens.attention import build

    found = {}
    for path in sorted(folder.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        found[path.stem] = declarations(config, build(config, head_dim=8, num_heads=1, max_length=8))
    return found


def fill(text: str, blocks: Mapping[str, str], page: str = "README.md") -> str:
    """`text` of `page` with the content of every named block replaced.

    Raises:
        ValueError: a block has no place in the text.
    """
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"`{page}` has {count} places `<!-- {name} -->`, it needs one")
    return text


def blocks(root: Path) -> dict[str, str]:
    """All blocks, from results/summary.json, conf/attention and benchmarks/peers.json under `root`."""
    import yaml

    methods = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))["attention"]
    summary = read_json(root / "results/summary.json")
    assert isinstance(summary, dict)
    shelf = declared_on_the_shelf(root / "conf/attention")
    stored = read_json(root / "benchmarks/peers.json")
    assert isinstance(stored, dict)
    return {
        "study": study_table(summary["data"], methods),
        "operators": operator_table(shelf),
        "benchmarks": benchmark_table(stored),
    }


def _number(value: float | str | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Rewrite README.md of the current folder."""
    path = Path("README.md")
    text = fill(path.read_text(encoding="utf-8"), blocks(Path.cwd()))
    with atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
