"""A subject small enough for every test: a random decoder or encoder on random tokens."""

import torch

from attnlens.models.build import build_model
from attnlens.substitution.subject import AbstractSubject, Batch
from tests.models.test_build import META, config


class Toy(AbstractSubject):
    """Scored by the mean distance of its outputs from those of the exact model: 0 for the exact one."""

    metric, higher_is_better = "distance", False

    def __init__(self, model="decoder", projection="gqa", *, masked=False):
        with torch.no_grad():
            self.model = build_model(config(position="rope", model=model, projection=projection), META, seed=0).eval()
        generator = torch.Generator().manual_seed(0)
        mask = (torch.arange(12) < torch.tensor([[12], [9], [10]])) if masked else None
        ids = [torch.randint(11, (3, 12), generator=generator) for _ in range(4)]
        self.fit, self.test = ([Batch(part, mask) for part in parts] for parts in (ids[:2], ids[2:]))
        with torch.no_grad():
            self.outputs = [self.model(batch.input_ids, key_padding_mask=batch.mask) for batch in self.test]

    def digest(self, output, place):
        return (output - self.outputs[place]).norm()

    def score(self, digests):
        return float(torch.stack(list(digests)).mean())
