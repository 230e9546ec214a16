"""params.yaml is read once and refused where it is wrong."""

from pathlib import Path

import pytest
import yaml

from attnlens.study import Study, read_cell, read_params, seed_file

GOOD = {
    "source": ["shakespeare"],
    "data": ["mqar"],
    "attention": ["softmax", "mean"],
    "projection": "mha",
    "seeds": 2,
    "budgets": [0.25, 1],
    "reference": "softmax",
    "subject": [],
    "substitution": ["mean"],
    "pretrained": ["smollm2"],
}


def write(folder, **changes):
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (GOOD | changes).items() if v is not ...}))
    return path


def test_the_axes(tmp_path):
    expected = Study(
        ("shakespeare",), ("mqar",), ("softmax", "mean"), "mha", 2, (0.25, 1.0), "softmax", (), ("mean",), ("smollm2",)
    )
    assert read_params(write(tmp_path)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": [1]}, r"unknown axes \['budget'\]"),
        ({"seeds": ...}, r"lacks \['seeds'\]"),
        ({"data": []}, "`data` must be a list"),
        ({"attention": "softmax"}, "`attention` must be a list"),
        ({"subject": "mqar"}, "`subject` must be a list"),
        ({"attention": ["softmax", "softmax"]}, "twice"),
        ({"projection": ["mha"]}, "`projection` must be one name"),
        ({"seeds": 0}, "`seeds` must be"),
        ({"seeds": True}, "`seeds` must be"),
        ({"budgets": []}, "`budgets` must be"),
        ({"budgets": [0]}, "`budgets` must be"),
        ({"reference": "performer"}, "`reference` must be one of"),
    ],
)
def test_wrong_axes_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_params(write(tmp_path, **changes))


def test_the_repository_has_valid_axes():
    assert read_params(Path(__file__).parents[1] / "params.yaml").seeds >= 1


def test_a_missing_cell_names_its_command(tmp_path):
    with pytest.raises(ValueError, match="dvc repro train@mqar-mean"):
        read_cell(tmp_path, "mean", "mqar")
    with pytest.raises(ValueError, match="dvc repro -f train@mqar-mean"):
        seed_file(tmp_path, "mean", "mqar", 0, "scores.npy")
