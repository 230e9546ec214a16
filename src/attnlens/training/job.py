"""What is handed to a worker and what comes back; cheap to import, since whoever hands it out needs no torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One seed of one cell.

    config: composed and resolved.
    data, attention: names of the conf files, hence of the cell.
    seed: of weights, operators, order of examples and noise.
    folder: Hydra's run folder, for what the logger writes.
    """

    config: Mapping[str, Any]
    data: str
    attention: str
    seed: int
    folder: str

    @property
    def label(self) -> str:
        """What lines of progress begin with."""
        return f"{self.data} {self.attention} seed {self.seed}"


class Outcome(NamedTuple):
    """What a seed came to: the folder of its results, or the reason why mathematics rules it out."""

    results: str | None
    parameters: int
    reason: str | None
