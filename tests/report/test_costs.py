"""docs/costs.md is what its generator makes, and the sizes that it quotes are those of layers that can be built."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_class

from attnlens.attention.softmax import Softmax
from attnlens.projection.cost import Shape
from attnlens.report.costs import MODELS, blocks
from attnlens.report.readme import fill

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    return {
        name: [re.split(r" *\| *", line)[1:-1] for line in text.splitlines()] for name, text in blocks(ROOT).items()
    }


def number(cell):
    return float(cell.replace(",", "").split(" ")[0])


def test_the_page_holds_the_generated_tables():
    text = (ROOT / "docs/costs.md").read_text(encoding="utf-8")
    assert fill(text, blocks(ROOT), "docs/costs.md") == text, "run `python -m attnlens.report.costs`"


def test_what_is_counted_is_what_the_formulas_say(tables):
    for row in tables["comparison"][2:]:
        assert row[5] == row[6]
        assert row[7] == row[8]
        assert row[9] == row[10]
    for row in tables["latent"][2:]:
        assert row[5] == row[6]


def test_every_model_is_a_layer_that_can_be_built():
    """On the meta device; Gemma 3, whose heads are narrower than its tokens, only by formula."""
    for name in MODELS:
        model = yaml.safe_load((ROOT / f"conf/sizes/{name}.yaml").read_text(encoding="utf-8"))
        options = {key: value for key, value in model["projection"].items() if key != "_target_"}
        kind, shape = (
            get_class(model["projection"]["_target_"]),
            Shape(model["width"], model["num_heads"], model["head_dim"]),
        )
        said = kind.cost(shape, options, new=1)
        if name == "gemma3_27b":
            continue
        if name == "deepseek_v2":
            options["content_dim"] = model["head_dim"]
        with torch.device("meta"):
            layer = kind(Softmax(), shape.width, shape.num_heads, **options)
        assert sum(weight.numel() for weight in layer.parameters()) == said.weights


def test_the_figures_of_the_introduction_are_found_again(tables):
    """Its own numbers: N_L 80, 62, 60; H 64, 32, 128; G 8, 16; d 8192, 5376, 5120; d_L 512."""
    cells = [row[1:5] for row in tables["models"][2:]]
    assert cells[:2] == [["80", "64", "8", "8,192"], ["62", "32", "16", "5,376"]]
    assert cells[2] == ["60", "128", "– (d_L 512, d_R 64)", "5,120"]
    n, heads, d, e = 131072, 64, 8192, 128
    grouped = {row[0]: number(row[2]) for row in tables["grouped memory"][2:]}
    assert grouped["all"] == 8 * n * 2 * e + heads * d * e + 8 * d * e + 8 * e * d + heads * e * d
    assert grouped["all"] == grouped["as we store it"]
    latent = {row[0]: number(row[2]) for row in tables["latent memory"][2:]}
    assert latent["all"] == n * 512 + 5120 * 512 + 128 * 512 * (5120 + 5120)
