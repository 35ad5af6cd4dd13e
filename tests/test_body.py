"""Decoding with a model's layers written out: equal to transformers' forward pass, and only where it is."""

from contextlib import nullcontext

import pytest
import torch
from test_models import ARCHITECTURES, BASE, random_model

from opdkit.layers import batched_attention
from opdkit.rollouts import body, sampler
from opdkit.rollouts.body import joined, make_body
from opdkit.rollouts.cache import CACHE, Part, attention, make_cache, states_of, unfused
from opdkit.rollouts.sampler import Keep, Sampling, sample

LONG = {"max_position_embeddings": 256}
SCALED = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}
KINDS = {
    "llama": BASE | LONG,
    "llama with biases": BASE | LONG | {"attention_bias": True, "mlp_bias": True},
    "llama with yarn": BASE | LONG | SCALED | {"num_attention_heads": 4},
    "qwen2": BASE | LONG,
    "qwen3": BASE | LONG | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": BASE | LONG | {"sliding_window": None},
}


@pytest.fixture(scope="module", params=KINDS)
def lm(request):
    found = random_model(request.param.split()[0], **KINDS[request.param])
    with torch.no_grad():
        for module in found.model.modules():  # biases and norms that are not what they start as
            for p in [getattr(module, "bias", None), getattr(module, "weight", None)]:
                if isinstance(p, torch.Tensor) and p.dim() == 1:
                    p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0]))
    return found


def prompts(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(2, 44, (n,), generator=generator).tolist() for n in lengths]


def compare(lm, monkeypatch, given, how, context=nullcontext, close=1e-5) -> None:
    """The same tokens and the same record with the body as without."""
    assert make_body(lm, 200) is not None
    with context():
        ours = [s for group in sample(lm, given, how, 5, Keep(top_k=3, hidden=True)) for s in group]
        monkeypatch.setattr(sampler, "make_body", lambda *_: None)
        theirs = [s for group in sample(lm, given, how, 5, Keep(top_k=3, hidden=True)) for s in group]
    assert [s.ids for s in ours] == [s.ids for s in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("logp", "entropy", "top", "hidden"):
            torch.testing.assert_close(getattr(a.capture, name), getattr(b.capture, name), rtol=close, atol=close)
    assert len({len(s.ids) for s in ours}) > 2  # rows left the batch at different times


@pytest.mark.parametrize("lengths", [(70, 70, 70), (90, 64, 7), (5, 9, 1)])
def test_groups_with_and_without_shared_prompts_decode_as_with_transformers(lm, monkeypatch, lengths):
    how = Sampling(4, 70, eos_ids=(3, 10, 12))  # past an enlargement of the buffers
    compare(lm, monkeypatch, prompts(lengths), how)


def test_single_responses_decode_as_with_transformers(lm, monkeypatch):
    compare(lm, monkeypatch, prompts((80, 66, 3, 80, 7, 9)), Sampling(1, 30, eos_ids=(3, 10, 12)))


def test_large_matrices_are_not_joined(lm, monkeypatch):
    monkeypatch.setattr(body, "JOINED", 0)
    compare(lm, monkeypatch, prompts((5, 9, 1)), Sampling(4, 20, eos_ids=(3, 10, 12)))


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "cohere", "granite", "qwen3_next"])
def test_other_architectures_and_windows_have_no_body(kind):
    assert make_body(random_model(kind, **ARCHITECTURES[kind]), 20) is None


def test_angles_that_depend_on_the_length_have_no_body():
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    settings = BASE | {"original_max_position_embeddings": 8, "rope_parameters": dynamic}
    assert make_body(random_model("llama", **settings), 20) is None


def test_a_watched_model_has_no_body():
    lm = random_model("llama", **BASE)
    handle = lm.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert make_body(lm, 20) is None
    handle.remove()
    assert make_body(lm, 20) is not None


def test_a_model_that_computes_something_else_fails_the_trial():
    lm = random_model("llama", **BASE)
    lm.model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    assert make_body(lm, 20) is None
    assert len(sample(lm, [[3, 4]], Sampling(2, 5), 1)[0]) == 2  # with transformers


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


def half():
    return torch.autocast("cpu", torch.bfloat16)


def test_weights_are_cast_once_and_keys_are_kept_in_half_precision():
    lm = random_model("qwen3", **BASE)
    with half(), torch.no_grad():
        made = make_body(lm, 20)
        assert made is not None and made.dtype == torch.bfloat16
        cache = make_cache(lm.model.config)
        lm.run(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True, **{CACHE: cache})
        assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
        part = Part(states_of(cache), torch.tensor([0, 0]), None, made.dtype, shared=True)
        made(torch.tensor([3, 4]), torch.tensor([3, 3]), [part])
        assert {t.dtype for buffer in part.own for t in buffer.room} == {torch.bfloat16}
        weight = torch.nn.Linear(4, 4)
        assert joined((weight,), torch.bfloat16)(torch.ones(1, 4))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_half_precision_samples_are_close_to_a_forward_pass_and_training_goes_on(kind):
    lm = random_model(kind, **(ARCHITECTURES.get(kind) or BASE))
    with half():
        ((s,),) = sample(lm, [[3, 4, 5]], Sampling(1, 12, eos_ids=(0,)), 1)
        ids = torch.tensor([[3, 4, 5, *s.ids]])
        logits = lm.model(ids).logits[0, 2:-1, : lm.vocab]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 3:], reduction="none")
        loss.sum().backward()  # in the same context: weights cast while sampling have no gradient
    assert (loss.detach() + s.capture.logp).abs().max() < 0.15
    assert all(p.grad.abs().sum() > 0 for n, p in lm.model.named_parameters() if n.endswith("weight") and p.dim() > 1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("queries", [1, 6])
def test_all_attentions_by_the_definition(queries):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, generator=generator).double() for n in (queries, 5, 5))
    mask = torch.zeros(3, 1, 1, 5).double()
    mask[1, ..., :2] = -torch.inf
    scores = torch.einsum("bgqd,bgtd->bgqt", q, k) * 0.3 + mask
    for found in (attention(q, k, v, mask, 0.3), unfused(q.float(), k.float(), v.float(), mask.float(), 0.3)):
        torch.testing.assert_close(found[0].double(), scores.softmax(-1) @ v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-6)
    bias = mask.expand(3, 2, queries, 5).flatten(0, 1)
    for given, wanted in ((bias, scores), (None, torch.einsum("bgqd,bgtd->bgqt", q, k) * 0.3)):
        torch.testing.assert_close(batched_attention(q, k, v, given, 0.3), wanted.softmax(-1) @ v)
