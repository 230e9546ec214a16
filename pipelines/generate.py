"""Text from a trained decoder, token by token through a cache; beside the pipeline.

    python pipelines/generate.py prompt="ROMEO:" temperature=0.8
    python pipelines/generate.py cache=sliding cell=models/softmax/shakespeare/seed0

Prints the text, the time of the prompt and of a token, and the size of the caches.
"""

import sys
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


@hydra.main(version_base="1.3", config_path="../conf", config_name="generate")
def main(config: DictConfig) -> None:
    """Load, continue, print; paths are relative to the folder the command runs in."""
    import torch
    from tokenizers import Tokenizer

    from attnlens.construct import construct
    from attnlens.models.generate import cache_bytes, generate
    from attnlens.training.load import load_decoder

    tokenizer = Tokenizer.from_file(str(Path(config.prepared) / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(config.prompt).ids])
    length = ids.shape[1] + config.num_tokens
    model, trained = load_decoder(Path(config.cell), Path(config.prepared), max_length=length)
    if length > trained:
        print(f"{length} tokens, and the model was trained on {trained}: positions are extrapolated", file=sys.stderr)
    policy = construct(config.cache)
    started = time.perf_counter()
    cache = model.init_cache(1, length, cache=policy)
    sizes: list[int] = []

    def step(cache: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
        after = model.step(cache, ids)
        sizes.append(cache_bytes(after[0]))
        return after

    generator = torch.Generator().manual_seed(config.seed)
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    new = generate(step, cache, ids, config.num_tokens, generator=generator, **options)
    seconds = time.perf_counter() - started
    print(tokenizer.decode([*ids[0].tolist(), *new[0].tolist()]))
    print(f"{new.shape[1]} tokens in {seconds:.2f} s, caches of {sizes[-1]} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
