"""all-MiniLM-L6-v2 as an `Encoder`: six post-norm layers of width 384, the mean of the last vectors as embedding.

Reference: "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers", Wang et
al., 2020, https://arxiv.org/abs/2002.10957; trained for sentences as in "Sentence-BERT: Sentence Embeddings using
Siamese BERT-Networks", Reimers and Gurevych, 2019, https://arxiv.org/abs/1908.10084.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from attnlens.data.fetch import verify_source
from attnlens.models.block import AbstractBlock, PostNorm
from attnlens.models.embedding import TokenEmbedding
from attnlens.models.encoder import Encoder
from attnlens.models.heads import MeanHead
from attnlens.models.mlp import GeluMlp
from attnlens.models.pretrained.weights import Operators, assign, exact, finished
from attnlens.position.learned import Learned
from attnlens.projection.mha import Mha

if TYPE_CHECKING:
    import tokenizers

_LAYER = {
    "attention.self.query": "projection.inputs.0",
    "attention.self.key": "projection.inputs.1",
    "attention.self.value": "projection.inputs.2",
    "attention.output.dense": "projection.output",
    "attention.output.LayerNorm": "norms.0",
    "intermediate.dense": "mlp.inner",
    "output.dense": "mlp.outer",
    "output.LayerNorm": "norms.1",
}
_WHOLE = {
    "embeddings.word_embeddings.weight": "embedding.weight",
    "embeddings.LayerNorm.weight": "embedding_norm.weight",
    "embeddings.LayerNorm.bias": "embedding_norm.bias",
}
# Of BERT's own tasks; the mean over tokens takes the pooler's place.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")


class MiniLm(NamedTuple):
    """The model in evaluation mode without gradients, and its tokenizer, which neither cuts nor pads."""

    model: Encoder
    tokenizer: "tokenizers.Tokenizer"


def load_minilm(folder: Path | str, *, operators: Operators = exact) -> MiniLm:
    """The model of a fetched source, data/raw/minilm, as `python pipelines/fetch.py source=minilm` leaves it.

    Raises:
        ValueError: the source has not been fetched, is damaged, or holds another architecture.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    missing = {"config.json", "model.safetensors", "tokenizer.json"} - verify_source(folder)["files"].keys()
    if missing:
        raise ValueError(f"`{folder}` lacks {sorted(missing)}: give what `source=minilm` fetched")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = build(config, operators)
    assign(model, read_tensors(folder / "model.safetensors"), str(folder / "model.safetensors"))
    finished(model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return MiniLm(model, tokenizer)


def build(config: dict, operators: Operators) -> Encoder:
    """The architecture of a BERT config; its weights are on the meta device, operators are not."""
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise ValueError(f"`config` is of {config.get('model_type')!r} with {config.get('hidden_act')!r}: give a BERT")
    width, epsilon = config["hidden_size"], config["layer_norm_eps"]
    attentions = [operators(layer) for layer in range(config["num_hidden_layers"])]
    with torch.device("meta"):
        blocks: list[AbstractBlock] = []
        for attention in attentions:
            mha = Mha(attention, width, config["num_attention_heads"], bias=True)
            norms: list[nn.Module] = [nn.LayerNorm(width, eps=epsilon) for _ in range(2)]
            blocks.append(PostNorm(mha, GeluMlp(width, expansion=config["intermediate_size"] / width), norms))
        embedding = TokenEmbedding(config["vocab_size"], width)
        position = Learned(width, config["max_position_embeddings"])
        norm = nn.LayerNorm(width, eps=epsilon)
    return Encoder(embedding, position, blocks, nn.Identity(), MeanHead(), embedding_norm=norm)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights under the names of `build`; positions hold the vector of the one token type that sentences have.

    Raises:
        ValueError: the file is no safetensors file, or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
    except SafetensorError as error:
        raise ValueError(f"`{path}` cannot be read ({error}): delete it and fetch it again") from error
    for name in _UNUSED:
        found.pop(name, None)
    positions, types = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    if positions in found and types in found:
        found["position.table"] = found.pop(positions) + found.pop(types)[0]
    return {_place(name): tensor for name, tensor in found.items()}


@torch.no_grad()
def embed(loaded: MiniLm, sentences: Sequence[str], *, max_length: int = 512) -> Float[Tensor, "s w"]:
    """Unit vectors whose products are similarities; a sentence beyond `max_length` tokens is cut."""
    rows = [loaded.tokenizer.encode(sentence).ids for sentence in sentences]
    rows = [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return F.normalize(loaded.model(ids, key_padding_mask=mask), dim=-1)


def _place(name: str) -> str:
    """The name in this package of a tensor of the file; an unknown one keeps its own, for the error that names it."""
    parts = name.split(".")
    if name.startswith("encoder.layer.") and ".".join(parts[3:-1]) in _LAYER:
        return f"blocks.{parts[2]}.{_LAYER['.'.join(parts[3:-1])]}.{parts[-1]}"
    return _WHOLE.get(name, name)
