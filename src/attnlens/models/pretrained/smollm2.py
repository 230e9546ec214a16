"""SmolLM2-135M-Instruct as a `Decoder`: 30 pre-norm layers of width 576, grouped-query attention, rotary positions.

The weights come from a GGUF file, quantized to 4 bits (5 with scales), the embeddings to 8. What they dequantize to is
kept beside the data, by default in half precision, which rounds it (17.353 in place of 17.359 of perplexity on the
beginning of Macbeth), and reopened by memory mapping; arithmetic is in float32.

Reference: "SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small Language Model", Ben Allal et al., 2025,
https://arxiv.org/abs/2502.02737.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnlens.data.fetch import verify_source
from attnlens.files import atomic
from attnlens.models.block import AbstractBlock, PreNorm
from attnlens.models.decoder import Decoder
from attnlens.models.embedding import TokenEmbedding
from attnlens.models.heads import TokenHead
from attnlens.models.mlp import SwigluMlp
from attnlens.models.pretrained.gguf import Gguf, halves
from attnlens.models.pretrained.weights import Operators, assign, exact, finished
from attnlens.position.rope import Rope
from attnlens.projection.gqa import Gqa

if TYPE_CHECKING:
    import tokenizers

FORMAT = "1"
PRECISIONS = {"half": torch.float16, "full": torch.float32}
_LAYER = {
    "attn_norm": "norms.0",
    "attn_q": "projection.inputs.0",
    "attn_k": "projection.inputs.1",
    "attn_v": "projection.inputs.2",
    "attn_output": "projection.output",
    "ffn_norm": "norms.1",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.inner",
    "ffn_down": "mlp.outer",
}


class Sizes(NamedTuple):
    """Of the architecture."""

    num_layers: int
    width: int
    hidden: int
    num_heads: int
    num_groups: int
    vocabulary_size: int
    max_length: int
    rope_base: float
    epsilon: float


class SmolLm2(NamedTuple):
    """The model in evaluation mode without gradients, its tokenizer, its sizes."""

    model: Decoder
    tokenizer: "tokenizers.Tokenizer"
    sizes: Sizes


def load_smollm2(
    folder: Path | str,
    *,
    precision: str = "half",
    cache: Path | str | None = None,
    operators: Operators = exact,
    max_length: int | None = None,
) -> SmolLm2:
    """The model of a fetched source.

    Args:
        folder: data/raw/smollm2, as `python pipelines/fetch.py source=smollm2` leaves it.
        precision: in which weights are kept, "half" (269 MB on disk) or "full" (538 MB, exactly what the file says).
        cache: where weights and tokenizer are kept, in a folder a precision; data/pretrained/smollm2 by default. Made
            at the first call (10 s), reopened afterwards.
        operators: the attention operator of each layer; exact attention by default.
        max_length: number of positions; all 8192 by default.

    Raises:
        ValueError: the source has not been fetched, is damaged, or holds another architecture; or an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is {precision!r}: choose one of {list(PRECISIONS)}")
    folder = Path(folder)
    manifest = verify_source(folder)
    cache = (folder.resolve().parents[1] / "pretrained" / folder.name if cache is None else Path(cache)) / precision
    weights = cache / "model.safetensors"
    if _stamp(weights) != f"{FORMAT} {manifest['sha256']}":
        convert(
            folder / _gguf_name(folder, manifest["files"]),
            cache,
            PRECISIONS[precision],
            stamp=f"{FORMAT} {manifest['sha256']}",
        )
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
        sizes = Sizes(**json.loads(file.metadata()["sizes"]))
    from tokenizers import Tokenizer

    model = build(sizes if max_length is None else sizes._replace(max_length=max_length), operators)
    assign(model, tensors, str(weights))
    tie(model)
    finished(model)
    return SmolLm2(model, Tokenizer.from_file(str(cache / "tokenizer.json")), sizes)


def build(sizes: Sizes, operators: Operators) -> Decoder:
    """The architecture; its weights are on the meta device, operators and positions are not."""
    position = Rope(sizes.width // sizes.num_heads, sizes.max_length, base=sizes.rope_base)
    attentions = [operators(layer) for layer in range(sizes.num_layers)]
    with torch.device("meta"):
        blocks: list[AbstractBlock] = []
        for attention in attentions:
            gqa = Gqa(attention, sizes.width, sizes.num_heads, sizes.num_groups, position=position)
            norms: list[nn.Module] = [nn.RMSNorm(sizes.width, eps=sizes.epsilon) for _ in range(2)]
            blocks.append(PreNorm(gqa, SwigluMlp(sizes.width, expansion=sizes.hidden / sizes.width), norms))
        embedding = TokenEmbedding(sizes.vocabulary_size, sizes.width)
        norm, head = nn.RMSNorm(sizes.width, eps=sizes.epsilon), TokenHead(sizes.width, sizes.vocabulary_size)
    model = Decoder(embedding, position, blocks, norm, head)
    tie(model)
    return model


def tie(model: Decoder) -> None:
    """Make the embeddings the weights of the head as well."""
    assert isinstance(model.head, TokenHead), "built so"
    model.head.linear.weight = model.embedding.get_parameter("weight")


def convert(path: Path, cache: Path, dtype: torch.dtype, *, stamp: str) -> None:
    """Write `model.safetensors`, under the names of `build`, and `tokenizer.json` into `cache`.

    Raises:
        ValueError: the file is damaged, or of another architecture.
    """
    file = Gguf(path)
    sizes = _sizes(file)
    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors():
        place = _place(name)
        num_heads = {"inputs.0.weight": sizes.num_heads, "inputs.1.weight": sizes.num_groups}.get(place[-15:])
        # Other numbers of rows are left for `assign` to name.
        if num_heads is not None and tensor.shape[0] % (2 * num_heads) == 0:
            tensor = halves(tensor, num_heads)
        tensors[place] = tensor.to(dtype).contiguous()
    metadata = {"stamp": stamp, "sizes": json.dumps(sizes._asdict())}
    assign(build(sizes, exact), tensors, str(path))
    tokenizer = build_tokenizer(file)
    with atomic(cache) as aside:
        aside.mkdir()
        save_file(tensors, aside / "model.safetensors", metadata=metadata)
        tokenizer.save(str(aside / "tokenizer.json"))


def build_tokenizer(file: Gguf) -> "tokenizers.Tokenizer":
    """Byte-level byte pairs; every digit is a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = file.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.value("tokenizer.ggml.merges")]
    if file.value("tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"`{file.path}` splits words by rule {file.value('tokenizer.ggml.pre')!r}, not as smollm does")
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, file.value("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _sizes(file: Gguf) -> Sizes:
    if file.value("general.architecture") != "llama":
        raise ValueError(f"`{file.path}` is a model of {file.value('general.architecture')!r}: give one of 'llama'")
    return Sizes(
        num_layers=file.value("llama.block_count"),
        width=file.value("llama.embedding_length"),
        hidden=file.value("llama.feed_forward_length"),
        num_heads=file.value("llama.attention.head_count"),
        num_groups=file.value("llama.attention.head_count_kv"),
        vocabulary_size=file.value("llama.vocab_size"),
        max_length=file.value("llama.context_length"),
        rope_base=float(file.value("llama.rope.freq_base")),
        # Stored in float32; the model was trained with 1e-5.
        epsilon=round(float(file.value("llama.attention.layer_norm_rms_epsilon")), 10),
    )


def _place(name: str) -> str:
    """The name in this package of a tensor of the file; an unknown one keeps its own, for the error that names it."""
    whole = {"token_embd.weight": "embedding.weight", "output_norm.weight": "norm.weight"}
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER:
        return f"blocks.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return whole.get(name, name)


def _gguf_name(folder: Path, names: Iterable[str]) -> str:
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) != 1:
        raise ValueError(f"`{folder}` holds {len(found)} GGUF files, not one: give what `source=smollm2` fetched")
    return found[0]


def _stamp(weights: Path) -> str | None:
    """Of what the cache holds; None where that is nothing whole, so that it is made again."""
    if not weights.is_file() or not (weights.parent / "tokenizer.json").is_file():
        return None
    try:
        with safe_open(weights, framework="pt") as file:
            return (file.metadata() or {}).get("stamp")
    except SafetensorError:
        return None
