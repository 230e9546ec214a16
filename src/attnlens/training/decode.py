"""The test of a model of pairs: decode every held-out source and count the errors against its references."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnlens.data.edits import Rates, error_rates
from attnlens.data.module import DataModule
from attnlens.data.store import IGNORED
from attnlens.models.generate import beam_search, generate
from attnlens.models.seq2seq import Seq2Seq


def check_decoding(decoding: Mapping | None, meta: Mapping) -> None:
    """Refuse a section `decoding` that the data cannot use, or the lack of one that it needs.

    Raises:
        ValueError: names the remedy.
    """
    if meta["task"] != "seq2seq":
        if decoding is not None:
            raise ValueError(f"`decoding` has no effect on {meta['data']}, whose test decodes nothing: leave it null")
        return
    if decoding is None:
        raise ValueError(f"`decoding` is null, but {meta['data']} has sequences to decode: give decoding.beam_width")
    if decoding["beam_width"] < 1:
        raise ValueError(f"`decoding.beam_width` must be at least 1 (greedy alone), got {decoding['beam_width']}")


def decode(model: Seq2Seq, batch: Mapping[str, Tensor], meta: Mapping, *, decoding: Mapping | None) -> list[list[int]]:
    """The target of each source of a batch without its end, greedily (None) or by a beam.

    A sequence that has not ended after `target_length` tokens is what it is by then.
    """
    length, inputs = meta["target_length"], batch["input_ids"]
    cache = model.init_cache(inputs, length, key_padding_mask=batch["attention_mask"])
    prompt = torch.full_like(inputs[:, :1], meta["begin"])
    if decoding is None:
        ids = generate(model.step, cache, prompt, length, end=meta["end"])
    else:
        options = {"width": decoding["beam_width"], "length_penalty": decoding["length_penalty"]}
        ids = beam_search(model.step, cache, prompt, length, end=meta["end"], **options).ids[:, 0]
    return [_before(row, meta["end"]) for row in ids.tolist()]


@torch.no_grad()
def decoded_rates(model: Seq2Seq, data: DataModule, *, decoding: Mapping | None, split: str = "test") -> Rates:
    """Decode a split, on the device where the model is; the model must be in evaluation mode."""
    device, found = next(model.parameters()).device, []
    for batch in data.test_dataloader() if split == "test" else data.val_dataloader():
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        found += decode(model, inputs, data.meta, decoding=decoding)
    return error_rates(found, references(data, split))


def references(data: DataModule, split: str) -> list[list[list[int]]]:
    """All references of each example, without padding."""
    column = data.examples(split).columns["references"].numpy()
    rows = [[one[one != IGNORED].tolist() for one in several if (one != IGNORED).any()] for several in column]
    assert all(rows), "the store holds a reference for each held-out example"
    return rows


def _before(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row
