"""Handwritten digits as sequences of 64 pixels: real data, small, and a control rather than a ranking.

The 1797 images of 8 x 8 pixels that scikit-learn carries, row by row; a pixel's intensity 0..16 is its token. A
logistic regression on the pixels comes so close to any attention here that differences between methods mean little;
it stands among the baselines for that reason.

Source: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnlens.data.store import Meta, Prepared

_INTENSITIES = 17
_CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """The images with their split, stratified by class.

    Attributes:
        num_validation, num_test: images held out; the others are training images.
        seed: of the split.
    """

    num_validation: int
    num_test: int
    seed: int

    def prepare(self, raw: Path) -> Prepared:
        """Load, split and measure the baselines.

        Raises:
            ValueError: so many held-out images that a split lacks a class, or so few.
        """
        from sklearn.datasets import load_digits

        images, classes = load_digits(return_X_y=True)
        pixels, labels = np.asarray(images, dtype=np.int64), np.asarray(classes, dtype=np.int64)
        order = split(labels, (self.num_validation, self.num_test), self.seed)
        splits = {
            name: {"input_ids": pixels[index], "labels": labels[index]}
            for name, index in zip(("validation", "test", "train"), order, strict=True)
        }
        content = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
        meta = Meta(
            task="classification",
            objective="classification",
            causal=False,
            vocabulary_size=_INTENSITIES,
            num_outputs=_CLASSES,
            length=pixels.shape[1],
            metric="accuracy",
            higher_is_better=True,
            chance=1 / _CLASSES,
            baselines=baselines(splits["train"], splits["test"]),
            sources={"scikit-learn load_digits": content},
        )
        return Prepared(splits, meta)


def split(labels: np.ndarray, sizes: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint sorted indices: two parts of the given sizes and the rest, each with the classes in proportion.

    Raises:
        ValueError: sizes that leave a part without one of each class.
    """
    from sklearn.model_selection import train_test_split

    num_classes = len(np.unique(labels))
    if min(sizes) < num_classes or sum(sizes) + num_classes > len(labels):
        raise ValueError(
            f"`num_validation`, `num_test` are {sizes}: give each {num_classes} or more, and leave {num_classes} or "
            f"more of {len(labels)}"
        )
    # Plain integers from one seed, so that both cuts are fixed by it.
    first, second = (int(state) for state in np.random.SeedSequence(seed).generate_state(2))
    rest, test = train_test_split(np.arange(len(labels)), test_size=sizes[1], random_state=first, stratify=labels)
    train, validation = train_test_split(rest, test_size=sizes[0], random_state=second, stratify=labels[rest])
    return np.sort(validation), np.sort(test), np.sort(train)


def baselines(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, float]:
    """Test accuracy of always naming the most frequent training class, and of logistic regression on pixels."""
    from sklearn.linear_model import LogisticRegression

    majority = np.bincount(train["labels"]).argmax()
    scale = _INTENSITIES - 1
    model = LogisticRegression(max_iter=2000).fit(train["input_ids"] / scale, train["labels"])
    return {
        "majority": float((test["labels"] == majority).mean()),
        "logistic_regression": float(model.score(test["input_ids"] / scale, test["labels"])),
    }
