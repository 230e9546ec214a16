"""SmolLM2 and MiniLM beside transformers, from the same files."""

import pytest
import torch
from torch.nn import functional as F

from attnlens.models.pretrained.minilm import embed
from tests.models.pretrained.conftest import minilm, play, smollm2  # noqa: F401 - fixtures
from tests.models.pretrained.sources import fetched

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[peers]'")


@pytest.mark.slow
def test_smollm2_has_the_logits_the_perplexity_and_the_tokens(smollm2, play):  # noqa: F811
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate: pip install '.[peers]'")
    folder, name = fetched("smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    for text in (play, "Room 1024, floor 7", "naïve café — “quotes”  \n\n\ttab 日本語 🙂"):
        assert smollm2.tokenizer.encode(text).ids == tokenizer(text, add_special_tokens=False).input_ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    ids = torch.tensor([smollm2.tokenizer.encode(play).ids[:512]])
    with torch.no_grad():
        expected, found = theirs(ids).logits, smollm2.model(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    losses = [F.cross_entropy(logits[0, :-1], ids[0, 1:]).exp() for logits in (found, expected)]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_minilm_has_the_similarities(minilm):  # noqa: F811
    folder = fetched("minilm")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    sentences = ["A man is eating food.", "Someone is having a meal.", "A plane takes off.", "Is it raining today?"]
    vectors = []
    for sentence in sentences:
        ids = torch.tensor([minilm.tokenizer.encode(sentence).ids])
        with torch.no_grad():
            vectors.append(F.normalize(theirs(ids).last_hidden_state.mean(1), dim=-1)[0])
    expected, ours = torch.stack(vectors), embed(minilm, sentences)
    torch.testing.assert_close(ours @ ours.T, expected @ expected.T, rtol=0, atol=5e-4)
