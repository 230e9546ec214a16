"""Operators inside models of transformers: a tiny Llama with grouped queries and a tiny BERT."""

from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from attnlens.attention import build

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[oracles]'")

from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from attnlens.interop.huggingface import build_operators, padding_mask, register

CONF = Path(__file__).resolve().parents[2] / "conf" / "attention"
HEADS, GROUPS, HEAD_DIM, LENGTH, VOCABULARY = 4, 2, 8, 24, 31
REAL = torch.ones(3, LENGTH, dtype=torch.long)


@cache
def operator(name):
    return build(OmegaConf.load(CONF / f"{name}.yaml"), head_dim=HEAD_DIM, num_heads=HEADS, max_length=64)


METHODS = sorted(path.stem for path in CONF.glob("*.yaml"))
SINGLE = [name for name in METHODS if operator(name).arity == 1]
CAUSAL = [name for name in SINGLE if operator(name).causal]
BIDIRECTIONAL = [name for name in SINGLE if not operator(name).causal]


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert register(max_length=64) == [f"attnlens:{name}" for name in METHODS]


def llama(name, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = LlamaConfig(**{**settings, **changes}, attn_implementation=name)
    return LlamaForCausalLM(config).eval()


def bert(name, **changes):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        initializer_range=0.4,
        attn_implementation=name,
        **changes,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def token_ids(seed=0, rows=3, length=LENGTH):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(side):
    """Rows with 0, 5 and 17 tokens of padding."""
    mask = REAL.clone()
    for row, count in enumerate((0, 5, 17)):
        mask[row, :count] = 0
    return mask if side == "left" else mask.flip(1)


@pytest.mark.parametrize("mask", [None, REAL, padding("right"), padding("left")])
def test_softmax_in_llama_is_eager(mask):
    ids = token_ids()
    expected, ours = (llama(name)(ids, attention_mask=mask).logits for name in ("eager", "attnlens:softmax"))
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mask", [None, padding("right"), padding("left")])
def test_softmax_in_bert_is_eager(mask):
    """In float64: BERT's eager form keeps the dtype."""
    ids = token_ids()
    models = (bert(name).double() for name in ("eager", "attnlens:softmax"))
    expected, ours = (model(ids, attention_mask=mask).last_hidden_state for model in models)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-12, atol=1e-12)


def test_another_scale_is_kept():
    ids, models = token_ids(), [llama("eager"), llama("attnlens:softmax")]
    plain = models[0](ids).logits
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 3.0
    torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=1e-4, atol=2e-5)
    assert (models[0](ids).logits - plain).abs().max() > 1e-2


def test_a_decoder_that_its_config_makes_bidirectional_is_so():
    ids, models = token_ids(), [llama("eager"), llama("attnlens:softmax")]
    for model in models:
        model.config.is_causal = False
    ours, expected = models[1](ids).logits, models[0](ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    assert (ours - llama("eager")(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_no_operator_sees_the_future_in_llama(name):
    """Nor anything but its own sequence: other tokens after t, and in other rows, leave outputs up to t unchanged."""
    model, ids, changed = llama(f"attnlens:{name}"), token_ids(), token_ids()
    changed[:, 14:] = token_ids(1)[:, 14:]
    changed[1] = token_ids(2)[1]
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[[0, 2], :14], before[[0, 2], :14], rtol=1e-4, atol=1e-4)
    assert (after[0, 14:] - before[0, 14:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_right_padding_is_never_read_in_llama(name):
    model, ids, mask = llama(f"attnlens:{name}"), token_ids(), padding("right")
    other = torch.where(mask.bool(), ids, token_ids(1))
    with torch.no_grad():
        first, second = (model(each, attention_mask=mask).logits for each in (ids, other))
        assert not torch.equal(model(ids).logits[2, -1], model(other).logits[2, -1])
    torch.testing.assert_close(second[mask.bool()], first[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SINGLE)
def test_padding_is_never_read_in_bert(name):
    model, ids, mask = bert(f"attnlens:{name}"), token_ids(), padding("right")
    other = torch.where(mask.bool(), ids, token_ids(1))
    with torch.no_grad():
        first, second = (model(each, attention_mask=mask).last_hidden_state for each in (ids, other))
    assert first[mask.bool()].isfinite().all()
    torch.testing.assert_close(second[mask.bool()], first[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_bidirectional_operator_is_refused_under_a_causal_model(name):
    with pytest.raises(ValueError, match=r"`causal=True` is not possible with \w+.*choose a causal operator"):
        llama(f"attnlens:{name}")(token_ids())


@pytest.mark.parametrize("name", ["softmax", "linear", "hedgehog", "window"])
def test_gradients_reach_all_projections(name):
    model, ids = llama(f"attnlens:{name}"), token_ids()
    model(ids, labels=ids).loss.backward()
    grads = {key: weight.grad for key, weight in model.named_parameters()}
    assert not [key for key, grad in grads.items() if grad is None or not grad.isfinite().all()]
    attention = model.model.layers[0].self_attn
    assert all(each.weight.grad.abs().max() > 0 for each in (attention.q_proj, attention.k_proj, attention.v_proj))


def test_learned_operators_train_and_are_saved_and_differ_by_layer():
    model = llama("attnlens:hedgehog")
    operators = build_operators(model, "hedgehog")
    weights = [list(each.parameters()) for each in operators]
    assert len(operators) == 2
    assert all(weights)
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=0.1), token_ids()
    before = weights[1][0].detach().clone()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert build_operators(model, "hedgehog") == operators
    assert (weights[1][0] - before).abs().max() > 0
    again = llama("attnlens:hedgehog")
    build_operators(again, "hedgehog")
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", None])
def test_generation_from_a_cache_is_that_of_eager(side):
    ids, mask = token_ids(), REAL if side is None else padding(side)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = llama("eager").generate(ids, **options)
    assert torch.equal(llama("attnlens:softmax").generate(ids, **options), expected)
    assert torch.equal(llama("attnlens:softmax").generate(ids, use_cache=False, **options), expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_gives_what_one_run_gives_or_is_refused(name):
    model, ids = llama(f"attnlens:{name}"), token_ids()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        start = model(ids[:, :15], use_cache=True)
        if not operator(name).one_query:
            with pytest.raises(ValueError, match=f"attnlens:{name} cannot continue.*`use_cache=False`"):
                model(ids[:, 15:], past_key_values=start.past_key_values)
            return
        rest = model(ids[:, 15:22], past_key_values=start.past_key_values)
        last = model(ids[:, 22:23], past_key_values=rest.past_key_values)
    parts = torch.cat([start.logits, rest.logits, last.logits], 1)
    torch.testing.assert_close(parts, whole[:, :23], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if operator(name).causal])
def test_one_query_is_declared_where_it_is_true(name):
    """Where it is not declared, one query over all keys is refused or gives something else."""
    generator, method = torch.Generator().manual_seed(0), operator(name)
    q, k, v = (2 * torch.randn(2, HEADS, 60, size * HEAD_DIM, generator=generator) for size in (1, *[method.arity] * 2))
    expected = method(q, k, v, causal=True)[:, :, -1:]
    if method.one_query:
        torch.testing.assert_close(method(q[:, :, -1:], k, v), expected, rtol=1e-4, atol=1e-4)
        return
    if method.self_attention:
        with pytest.raises(ValueError, match="as many queries as keys"):
            method(q[:, :, -1:], k, v)
        return
    assert (method(q[:, :, -1:], k, v) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in METHODS if operator(name).arity > 1])
def test_an_operator_of_several_keys_a_token_is_refused(name):
    with pytest.raises(ValueError, match=f"attnlens:{name} takes 2 keys and values for every token"):
        llama(f"attnlens:{name}")(token_ids())


def test_what_cannot_be_kept_is_refused_with_the_remedy(tmp_path):
    ids = token_ids()
    with pytest.raises(ValueError, match=r"`dropout`.*0\.3.*`attention_dropout`"):
        llama("attnlens:softmax", attention_dropout=0.3).train()(ids)
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(batch, length\).*\(1, 1, 24, 24\)"):
        llama("attnlens:softmax")(ids, attention_mask=torch.zeros(1, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match=r"static cache.*`use_cache=False`"):
        llama("attnlens:softmax").generate(ids, attention_mask=REAL, max_new_tokens=2, cache_implementation="static")
    packed = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None].expand(3, -1)
    with pytest.raises(ValueError, match="packed sequences"):
        llama("attnlens:softmax")(ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match=r"`configs`: no yaml file in .*conf/attention"):
        register(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"'nothing' is not registered.*`register"):
        build_operators(llama("attnlens:softmax"), "nothing")
    with pytest.raises(ValueError, match="has no module that attends"):
        build_operators(torch.nn.Linear(2, 2), "softmax")


def test_a_mapping_serves_in_place_of_files():
    names = register({"mine": {"_target_": "attnlens.attention.window.Window", "window": 3}}, seed=5)
    assert names == ["attnlens:mine"]
    assert build_operators(bert("attnlens:mine"), "mine")[0].window == 3


def test_a_mask_of_ones_is_no_mask():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert padding_mask(2, 5, 5, attention_mask=mask) is None
    mask[0, 0] = False
    assert torch.equal(padding_mask(2, 5, 5, attention_mask=mask), mask)
