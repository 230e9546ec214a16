"""A bidirectional Transformer: every token sees all others.

Reference: "BERT: pre-training of deep bidirectional Transformers", Devlin et al., 2019.
"""

from typing import ClassVar, final

from attnlens.models.base import AbstractStack


@final
class Encoder(AbstractStack):
    """Token ids to logits through bidirectional attention."""

    causal: ClassVar[bool] = False
