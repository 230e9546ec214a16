"""What is compared with what: one case a line of the table."""

from collections.abc import Callable
from dataclasses import dataclass, field

import adapters


@dataclass(frozen=True)
class Case:
    """An operator beside its peer.

    Attributes:
        name: of the line, unique.
        method: a file of conf/attention.
        arguments: what replaces the values in that file.
        length, causal, backward: the task; 8 heads of 64, batch 1, float32.
        peer: builds the peer as peer(length, causal, **peer_arguments); None where exact attention alone is compared.
        short: what replaces arguments of both sides, where they have them, at the short length of the errors.
        goal: least ratios of time to reach, "peer" and "exact", and the largest share of the peer's "memory".
    """

    name: str
    method: str
    arguments: dict[str, object]
    length: int = 4096
    causal: bool = False
    backward: bool = False
    peer: Callable[..., adapters.Attention] | None = None
    peer_arguments: dict[str, object] = field(default_factory=dict)
    short: dict[str, object] = field(default_factory=dict)
    goal: dict[str, float] = field(default_factory=dict)


def window(name: str, length: int, other: Callable[..., adapters.Attention], backward: bool, **goal: float) -> Case:
    """A causal window of 256."""
    arguments: dict[str, object] = {"window": 256}
    return Case(name, "window", arguments, length, True, backward, other, arguments, goal=goal)


def nystrom(landmarks: int, **goal: float) -> Case:
    """Landmarks and 16 pilots, beside six Newton-Schulz steps."""
    ridges = {"_target_": "attnlens.linalg.pseudo_inverse.RidgePath", "ridges": [1e-3, 1e-4, 1e-2]}
    arguments = {"num_landmarks": landmarks, "inverse": ridges, "num_pilots": 16}
    others: dict[str, object] = {"num_landmarks": landmarks}
    name = f"nystromformer {landmarks}"
    return Case(name, "nystromformer", arguments, peer=adapters.nystrom, peer_arguments=others, goal=goal)


def reformer(name: str, length: int, causal: bool, **goal: float) -> Case:
    """Four rounds of chunks of 64."""
    arguments: dict[str, object] = {"chunk_size": 64, "num_rounds": 4}
    others: dict[str, object] = {"bucket_size": 64, "num_rounds": 4}
    return Case(name, "reformer", arguments, length, causal, False, adapters.reformer, others, goal=goal)


def recurrent(method: str, other: Callable[..., adapters.Attention], forward: float, both: float) -> list[Case]:
    """Causal at 2048 tokens, forward and with backward."""
    common = {"method": method, "arguments": {}, "length": 2048, "causal": True, "peer": other}
    return [
        Case(name=method, **common, goal={"peer": forward}),
        Case(name=f"{method} train", **common, backward=True, goal={"peer": both}),
    ]


def features(name: str, length: int, causal: bool, **goal: float) -> Case:
    """256 positive random features."""
    arguments: dict[str, object] = {"num_features": 256}
    return Case(name, "performer", arguments, length, causal, False, adapters.performer, arguments, goal=goal)


CASES = [
    Case("mean", "mean", {}),
    Case("mean causal", "mean", {}, causal=True),
    window("window", 4096, adapters.local_attention, False, peer=4),
    window("window flex", 4096, adapters.flex, False, peer=2),
    window("window 8192", 8192, adapters.local_attention, False, peer=4, exact=6),
    window("window train", 4096, adapters.local_attention, True, peer=4),
    Case(
        name="longformer",
        method="longformer",
        arguments={"window": 257, "num_global": 0},
        length=8192,
        peer=adapters.longformer,
        peer_arguments={"window": 256},
        goal={"peer": 5, "memory": 0.2},
    ),
    Case(
        name="bigbird",
        method="bigbird",
        arguments={"block_size": 64, "num_global": 1, "num_random": 3},
        length=8192,
        peer=adapters.bigbird,
        peer_arguments={"block_size": 64, "num_random": 3},
        goal={"peer": 8, "memory": 0.2},
    ),
    reformer("reformer", 4096, False, peer=4, exact=1),
    reformer("reformer 16384", 16384, False, exact=1),
    reformer("reformer causal", 4096, True, peer=4),
    Case(
        name="routing",
        method="routing",
        arguments={"chunk_size": 128, "num_clusters": 64},
        length=8192,
        peer=adapters.routing,
        peer_arguments={"num_clusters": 64, "window": 128},
        short={"num_clusters": 8},
        goal={"peer": 2},
    ),
    Case(
        name="hyperattention",
        method="hyperattention",
        arguments={"block_size": 256, "num_planes": 7},
        peer=adapters.hyperattention,
        peer_arguments={"block_size": 256},
        goal={"peer": 2},
    ),
    Case(
        name="hyperattention causal",
        method="hyperattention",
        arguments={"block_size": 256, "num_planes": 7},
        length=8192,
        causal=True,
        peer=adapters.hyperattention,
        peer_arguments={"block_size": 256},
        goal={"exact": 1},
    ),
    Case(
        name="kdeformer",
        method="kdeformer",
        arguments={"block_size": 64, "num_samples": 128, "num_planes": 7},
        peer=adapters.kdeformer,
        peer_arguments={"block_size": 64, "num_samples": 128},
        goal={"peer": 1},
    ),
    nystrom(256, peer=2.5),
    nystrom(64, peer=1.5),
    Case(
        name="linformer",
        method="linformer",
        arguments={"num_keys": 256},
        length=8192,
        peer=adapters.linformer,
        peer_arguments={"num_keys": 256},
        goal={"peer": 1.5, "memory": 0.5},
    ),
    features("performer", 4096, False, peer=3.5, memory=1 / 6),
    features("performer causal", 2048, True, peer=20, memory=1 / 6),
    *recurrent("linear", adapters.linear, 1.5, 2),
    *recurrent("delta", adapters.delta, 2, 4),
    *recurrent("gated_delta", adapters.gated_delta, 2, 4),
    *recurrent("gla", adapters.gla, 2, 4),
    Case(
        name="hierarchical",
        method="hierarchical",
        arguments={"block_size": 64, "num_points": 16, "variance": False},
        length=8192,
        goal={"exact": 3},
    ),
    Case(
        name="hierarchical sinks",
        method="hierarchical",
        arguments={"block_size": 64, "num_points": 4, "variance": False, "num_sinks": 1},
        peer=adapters.h_transformer,
        peer_arguments={"block_size": 16},
        goal={"peer": 1},
    ),
]
