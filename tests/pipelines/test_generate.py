"""Text from a trained cell, as a user asks for it."""

import subprocess

import pytest

from tests.pipelines.test_approximate import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A decoder of two steps on a text of its own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text("to be, or not to be, that is the question: " * 200)
    steps = ["training.steps=2", "training.warmup_steps=1", "training.batch_size=4", "workers=1", "out=cell"]
    done = run("prepare.py", folder, "data=text", "data.path=my.txt", "data.length=16")
    assert done.returncode == 0, done.stderr
    done = run("train.py", folder, "data=text", "model=decoder", "position=rope", *steps)
    assert done.returncode == 0, done.stderr
    return folder


def generate(folder, *overrides) -> subprocess.CompletedProcess:
    arguments = ["cell=cell/seed0", "prepared=data/prepared/text", *overrides]
    return run("generate.py", folder, *arguments, logger=False)


def test_it_continues_the_prompt_and_repeats_itself_at_a_seed(trained):
    first, second = (generate(trained, "prompt='to be'", "num_tokens=9") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("to be")
    assert len(first.stdout.rstrip("\n")) == len("to be") + 9
    assert first.stdout == second.stdout
    assert "9 tokens in" in first.stderr
    assert "extrapolated" not in first.stderr


def test_beyond_the_trained_length_it_says_so(trained):
    done = generate(trained, "prompt='to be'", "num_tokens=30", "temperature=0")
    assert done.returncode == 0, done.stderr
    assert "35 tokens, and the model was trained on 16: positions are extrapolated" in done.stderr


def test_what_is_not_there_is_named_with_its_command(trained):
    done = generate(trained, "cell=nothing")
    assert done.returncode != 0
    assert "`nothing/model.safetensors` is missing: train the cell" in done.stderr
