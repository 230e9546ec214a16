"""A pretrained sentence encoder on passages of plays: which play does a passage come from?

Each work is cut in half. The centroid of a work is the mean of the exact model's embeddings of passages of its first
half; a passage of the second half belongs to the work whose centroid is nearest. Names of characters give much away,
so that this is no hard task: what is asked is how much of it an operator loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlens.models.base import AbstractStack
from attnlens.models.pretrained.minilm import load_minilm
from attnlens.substitution.subject import AbstractSource, AbstractSubject, Batch
from attnlens.substitution.texts import read_work


@dataclass(frozen=True)
class MiniLm(AbstractSource):
    """all-MiniLM-L6-v2 on passages.

    Attributes:
        source: folder of data/raw that holds the model.
        text: folder of data/raw that holds the works.
        works: names of the classes.
        passages: of each half of a work, evenly spread.
        length: tokens in a passage, those of its beginning and its end included.
    """

    source: str
    text: str
    works: Sequence[str]
    passages: int
    length: int

    def load(self, root: Path) -> "SentenceSubject":
        loaded = load_minilm(root / "data/raw" / self.source)
        halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        for work in self.works:
            encoding = loaded.tokenizer.encode(read_work(root, self.text, work), add_special_tokens=False)
            ids = torch.tensor(encoding.ids)
            for half, part in zip(halves, ids.chunk(2), strict=True):
                half.append(_passages(part, work, self.passages, self.length - 2, loaded.tokenizer))
        return SentenceSubject(loaded.model, *halves)


class SentenceSubject(AbstractSubject):
    """Scored by the accuracy of the nearest centroid; a batch is a work."""

    metric = "accuracy"
    higher_is_better = True

    def __init__(self, model: AbstractStack, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        self.model = model
        self.fit = [Batch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in first]
        self.test = [Batch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in second]
        with torch.no_grad():
            outputs = [model(batch.input_ids, key_padding_mask=batch.mask) for batch in self.fit]
        self.centroids = F.normalize(torch.stack([F.normalize(output, dim=-1).mean(0) for output in outputs]), dim=-1)

    def digest(self, output: Tensor, place: int) -> Tensor:
        nearest = (F.normalize(output, dim=-1) @ self.centroids.T).argmax(-1)
        return (nearest == place).double()

    def score(self, digests: Sequence[Tensor]) -> float:
        return float(torch.cat(list(digests)).mean())


def _passages(ids: Tensor, work: str, number: int, length: int, tokenizer) -> Tensor:  # noqa: ANN001 - tokenizers'
    if len(ids) < number * length:
        raise ValueError(
            f"`{work}` has {len(ids)} tokens in a half, which are no {number} passages of {length}: ask for fewer"
        )
    starts = [place * (len(ids) - length) // max(number - 1, 1) for place in range(number)]
    rows = torch.stack([ids[start : start + length] for start in starts])
    first, last = (torch.full((number, 1), tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]"))
    return torch.cat([first, rows, last], 1)
