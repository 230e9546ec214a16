"""Chunks of tokens by their rank within a bucket, and which of them a row sees: its own and the one before.

A token j has bucket b(j) and rank t(j), the number of earlier tokens in its bucket, which the past alone determines.
Chunks are c consecutive ranks; a row i sees

    b(j) = b(i),  floor(t(i) / c) - floor(t(j) / c) in {0, 1}.

In the order of (bucket, position) these are neighbors: 2 c - 1 places before the row at most, and c - 1 behind it. So
consecutive places are cut into tiles of rows, and the keys of a tile are one window of the same order (`Band`): sorted
once, keys and values are read through overlapping views. As buckets come by size, neighbors need windows of like width,
and where the host may read values every run of tiles has a window no wider than its rows need.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.linalg.blocks import host_reads_are_free, inverse


def chunk_labels(
    buckets: Int[Tensor, "b h r n"], num_buckets: int, chunk_size: int, mask: Bool[Tensor, "b n"] | None
) -> tuple[Int[Tensor, "b h r n"], Int[Tensor, "b h r n"]]:
    """A number for every chunk, in which the next chunk of a bucket is the next number and no other bucket's is; and
    the tokens in the order of (bucket, position), smaller buckets first. Padding is in a bucket of its own."""
    n, device = buckets.shape[-1], buckets.device
    if mask is not None:
        buckets = torch.where(mask[:, None, None], buckets, num_buckets)
    zeros = torch.zeros(*buckets.shape[:3], num_buckets + 1, dtype=torch.long, device=device)
    count = zeros.scatter_add(-1, buckets, torch.ones_like(buckets))
    count, by_size = count.sort(dim=-1)
    buckets = inverse(by_size).gather(-1, buckets)
    order = (buckets * n + torch.arange(n, device=device)).argsort(dim=-1)
    start = (count.cumsum(-1) - count).gather(-1, buckets)
    return start // chunk_size + 2 * buckets + (inverse(order) - start) // chunk_size, order


def sees(of_rows: Int[Tensor, "*k n #m"], of_columns: Int[Tensor, "*k #n m"]) -> Bool[Tensor, "*k n m"]:
    """Whether the column's chunk is the row's or the one before it."""
    return (of_rows - of_columns) >> 1 == 0


class Band(NamedTuple):
    """Places in the order of (bucket, position) in tiles of `size` rows, each with the keys from `before` places before
    its first row to `after` places behind its last."""

    size: int
    before: int
    after: int

    @property
    def width(self) -> int:
        return self.before + self.size + self.after


def widest_band(length: int, chunk_size: int, causal: bool) -> Band:
    """The two chunks of a row lie within 2 c places before it and c behind; a short input is one tile."""
    band = Band(-(-chunk_size // 64) * 32, 2 * chunk_size, 0 if causal else chunk_size)
    return band if band.width < length else Band(length, 0, 0)


def run_bands(labels: Int[Tensor, "g n"], widest: Band, tiles: int) -> list[Band]:
    """The band of every run of so many tiles, from the labels in order: most buckets are smaller than two chunks."""
    n, size = labels.shape[1], widest.size
    first = torch.arange(0, n, size, device=labels.device)
    if widest.before == 0 or not host_reads_are_free(labels):
        return [widest] * -(-len(first) // tiles)
    last = (first + size).clamp(max=n) - 1
    before = first - torch.searchsorted(labels, labels[:, first] - 1)
    after = torch.searchsorted(labels, labels[:, last].contiguous(), right=True) - 1 - last
    reach = torch.stack([before, after if widest.after else 0 * after]).amax(1)
    needs = [part.amax(1).tolist() for part in reach.split(tiles, 1)]
    # The kernels like widths that are multiples of 16.
    return [Band(size, min(b + -(b + size + a) % 16, widest.before), a) for b, a in needs]


def band_bias(labels: Int[Tensor, "r g p"], band: Band, causal: bool, dtype: torch.dtype) -> Float[Tensor, "g t s w"]:
    """0 where a row sees a key in the last of the rounds and in none before it, else -inf; labels are doubled.

    |row - 1 - column| is 1 for the row's own chunk and the one before, odd and larger for all others. Arithmetic on
    short integers: comparisons and fills of masks take a CPU ten times as long.
    """
    rounds, g, p = labels.shape
    tiles = (p - band.width) // band.size + 1
    rows = (labels[..., band.before : p - band.after] - 1).view(rounds, g, tiles, band.size, 1)
    columns = labels.unfold(2, band.width, band.size)[..., None, :]
    apart = (rows[-1] - columns[-1]).abs_()
    if rounds > 1:
        earlier = (rows[0] - columns[0]).abs_()
        for r in range(1, rounds - 1):
            earlier = torch.minimum(earlier, (rows[r] - columns[r]).abs_())
        apart = torch.maximum(apart, 4 - earlier)  # 3 where an earlier round has the pair
    place = torch.arange(band.width, device=labels.device) - band.before
    row = torch.arange(band.size, device=labels.device)[:, None]
    hidden = place >= row if causal else place == row
    largest = torch.finfo(dtype).max
    shown = torch.full(hidden.shape, largest, dtype=dtype, device=labels.device).masked_fill(hidden, -torch.inf)
    # largest - largest = 0 where the row sees the key, largest - 3 largest = -inf where it does not.
    return apart.to(dtype).mul_(-largest).add_(shown)
