"""How far attention over clusters is from softmax attention: the two ways in which a closed cluster errs.

Let p_c be the softmax mass of closed cluster c in a row and P_{j|c} the weights within it, p~_c and P~_{j|c} those of
the approximation, and let exact keys count as one more cluster, within which both agree. Then

    y~ - y = sum_c p~_c sum_j (P~_{j|c} - P_{j|c}) v_j + sum_c (p~_c - p_c) (softmax mean of the values of c),
    |y~ - y| <= sum_c p~_c TV(P~_{.|c}, P_{.|c}) diam(V_c) + TV(p~, p) diam(V),

since sums with weights of total zero are differences of means, times half the weights' l1 norm. With x_j = s <q, k_j -
c> and |x_j| <= X = s |q| rad_c, weights e^{x_j} replaced by 1 have TV(P~_{.|c}, P_{.|c}) <= tanh(X/2) <= X/2, replaced
by 1 + x_j, e^X - 1 - X; and the masses obey 0 <= log(p_c/p~_c) + const <= X^2/2 (Jensen's inequality and Hoeffding's
lemma), so that TV(p~, p) <= delta (1 - min_c e^{-X^2/2}), delta the mass of all closed clusters.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.linalg.blocks import inverse
from attnlens.linalg.clusters import Clusters, Field


def owners(clusters: Clusters, num_members: int) -> Int[Tensor, "b h m"]:
    """The cluster of every member, -1 where it has none."""
    rank = inverse(clusters.order)
    end = (clusters.start + clusters.members).contiguous()
    cluster = torch.searchsorted(end, rank, right=True).clamp_max(end.shape[-1] - 1)
    inside = (rank >= clusters.start.gather(-1, cluster)) & (rank < end.gather(-1, cluster))
    cluster = torch.where(inside, cluster, -1)[..., :num_members]
    return torch.nn.functional.pad(cluster, (0, num_members - cluster.shape[-1]), value=-1)


def standing_for(
    field: Field, fine: Clusters, coarse: Clusters | None, num_keys: int
) -> tuple[Int[Tensor, "b h n m"], Int[Tensor, "b h m"], Int[Tensor, "b h m"]]:
    """The cluster that stands for each key in each row (coarse ones counted after the fine, -1: none, the key is exact
    or hidden), and the fine and the coarse cluster of each key."""
    of_fine = owners(fine, num_keys)
    rows = field.keys.members.shape[:3]
    node = of_fine[:, :, None].expand(*rows, -1)
    of_coarse = torch.full_like(of_fine, -1)
    if coarse is not None and field.fine is not None:
        num_fine = fine.size.shape[-1]
        of_coarse = owners(coarse, num_fine).gather(-1, of_fine.clamp_min(0))
        of_coarse = torch.where(of_fine < 0, -1, of_coarse)
        seen = torch.zeros(*rows, num_fine, dtype=torch.long, device=node.device)
        seen = seen.scatter_add(-1, field.fine.members, field.fine.filled.long()) > 0
        closed = (num_fine + of_coarse)[:, :, None].expand_as(node)
        node = torch.where((node < 0) | seen.gather(-1, node.clamp_min(0)), node, closed)
    exact = torch.zeros(*rows, num_keys, dtype=torch.long, device=node.device)
    exact = exact.scatter_add(-1, field.keys.members, field.keys.filled.long()) > 0
    return torch.where(exact, -1, node), of_fine, of_coarse


def diameters(v: Float[Tensor, "b h m dv"], cluster: Int[Tensor, "b h m"], num_clusters: int) -> Float[Tensor, "b h c"]:
    """The largest distance of two values of each cluster; members of cluster -1 are left out."""
    same = (cluster[..., None] == cluster[..., None, :]) & (cluster >= 0)[..., None]
    # A difference of squared norms, by a matrix product, loses small distances of long values.
    apart = torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist")
    widest = apart.masked_fill(~same, 0).amax(-1)
    zeros = v.new_zeros(*v.shape[:2], num_clusters + 1)
    place = torch.where(cluster < 0, num_clusters, cluster)
    return zeros.scatter_reduce(-1, place, widest, "amax")[..., :-1]


def cluster_bound(
    weights: Float[Tensor, "b h n m"],
    approximate: Float[Tensor, "b h n m"],
    node: Int[Tensor, "b h n m"],
    of_nodes: Float[Tensor, "b h c"],
    of_all: Float[Tensor, "b h #n"],
) -> Float[Tensor, "b h n"]:
    """The bound above from both matrices, the diameters of the values of each cluster and of all: analysis."""
    num_nodes = of_nodes.shape[-1]
    place = torch.where(node < 0, num_nodes, node)
    zeros = weights.new_zeros(*weights.shape[:3], num_nodes + 1)
    mass, found = zeros.scatter_add(-1, place, weights), zeros.scatter_add(-1, place, approximate)
    ratio = torch.where(mass > 0, found / torch.where(mass > 0, mass, 1), 0)
    apart = (weights * ratio.gather(-1, place) - approximate).abs().masked_fill(node < 0, 0) / 2
    within = torch.nn.functional.pad(of_nodes, (0, 1))[:, :, None].expand_as(mass).gather(-1, place)
    return (apart * within).sum(-1) + (mass - found).abs().sum(-1) / 2 * of_all
