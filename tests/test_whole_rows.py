"""Whole rows through the layers written out: states, gradients and prompts' keys as transformers has them."""

import pytest
import torch
from test_body import KINDS
from test_models import GPT2, random_model
from test_packing import ROLLOUTS, qwen, rollout, wrap

from opdkit import reading
from opdkit.layers import angles, rms_norm, turn
from opdkit.models import checkpoint_activations
from opdkit.packing import enable
from opdkit.reading import Padded, agrees, fits, short_attention, states
from opdkit.rollouts.body import make_body
from opdkit.rollouts.decoder import Decoder
from opdkit.views.batches import Batch

ORDER = tuple(range(len(ROLLOUTS)))


@pytest.fixture(params=KINDS)
def lm(request):
    found = random_model(request.param.split()[0], **KINDS[request.param])
    found.model.double()
    with torch.no_grad():
        for p in found.model.parameters():
            if p.dim() == 1:  # biases and norms that are not what they start as
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0]))
    found.packs = enable(found.model)
    assert found.packs
    return found


def both_ways(lm, packed: bool, weights: torch.Tensor):
    found = []
    for reads in (True, False):
        lm.reads = reads
        lm.model.zero_grad()
        got = Batch(ORDER, packed).states(lm, ROLLOUTS)
        (got * weights).sum().backward()
        found.append((got.detach(), {n: p.grad.clone() for n, p in lm.model.base_model.named_parameters()}))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_states_and_gradients_are_those_of_transformers(lm, packed: bool) -> None:
    assert agrees(lm)
    size = lm.model.config.hidden_size
    weights = torch.randn(sum(len(r.trained_index) for r in ROLLOUTS), size, dtype=torch.float64)
    (ours, grads), (theirs, expected) = both_ways(lm, packed, weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)  # the norms of transformers run in float32
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max()), msg=name
        )


def test_padded_and_packed_rows_agree_to_the_last_digits() -> None:
    model = qwen()
    assert enable(model)
    lm, found = wrap(model), []
    lm.reads = True
    weights = torch.randn(sum(len(r.trained_index) for r in ROLLOUTS), 32, dtype=torch.float64)
    for packed in (False, True):
        model.zero_grad()
        got = Batch(ORDER, packed).states(lm, ROLLOUTS)
        (got * weights).sum().backward()
        found.append((got.detach(), *[p.grad.clone() for p in model.model.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_activations_change_no_gradient(packed: bool) -> None:
    model = qwen()
    assert enable(model)
    lm, grads = wrap(model), []
    lm.reads = True
    for again in (False, True):
        if again:
            checkpoint_activations(model)
            model.train()
        model.zero_grad()
        Batch(ORDER, packed).states(lm, ROLLOUTS).square().sum().backward()
        grads.append([p.grad.clone() for p in model.model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_norm_and_turn_have_the_gradients_of_their_formulas() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(4, 3, 6).double().requires_grad_(), torch.randn(6).double().requires_grad_()
    eps = torch.tensor(1e-3, dtype=torch.float64)
    plain = weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    torch.testing.assert_close(rms_norm(x, weight, eps), plain)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, eps), (x, weight))
    cos, sin = torch.randn(4, 1, 6).double(), torch.randn(4, 1, 6).double()
    assert torch.autograd.gradcheck(lambda a: turn(a, cos, sin), (x,))


def test_a_turn_is_a_rotation_by_the_angle_of_the_position() -> None:
    model = qwen()
    table = angles(model.model.rotary_emb, torch.zeros(1, dtype=torch.float64), 5)
    x = torch.zeros(1, 1, 8, dtype=torch.float64)
    x[0, 0, 0] = 1.0  # the first pair is entries 0 and 4; its angle is the position itself
    found = turn(x, table[3:4, None, 0], table[3:4, None, 1])[0, 0]
    expected = torch.zeros(8, dtype=torch.float64)
    expected[0], expected[4] = torch.cos(torch.tensor(3.0)), torch.sin(torch.tensor(3.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_last_layer_runs_where_it_is_read_only() -> None:
    lm = wrap(qwen(), packs=False)
    lm.reads, seen = True, {}
    for name, module in lm.model.named_modules():
        if name.endswith(("q_proj", "k_proj", "down_proj")):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].shape[0]}))
    chosen = [rollout([3] * 20, [4, 5]), rollout([6] * 10, [7, 8, 9])]
    states(lm, reading.rows_of(chosen, False, lm.device))
    grid, read = 2 * 21, 5
    first, last = (f"model.layers.{i}." for i in (0, 1))
    assert [seen[f"{first}{n}"] for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")] == [grid] * 3
    assert [seen[f"{last}{n}"] for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")] == [read, grid, read]


def test_prompts_read_by_the_written_out_layers_decode_the_same(lm) -> None:
    prompts, owner = [[5, 6, 7, 8], [9], [3, 4]], torch.tensor([0, 1, 1, 2])
    lm.model.float()
    decoders = []
    with torch.inference_mode():
        for reads in (True, False):
            lm.reads = reads
            decoder = Decoder(lm, prompts, owner, 4, make_body(lm, 8))
            first = decoder.hidden
            decoder.advance(torch.tensor([4, 5, 6, 7]))
            decoders.append((first, decoder.hidden))
    for a, b in zip(*decoders, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rows_without_a_trained_token_read_nothing() -> None:
    rows = Padded.of([[3, 4], [5]], [[], []], torch.device("cpu"))
    lm = wrap(qwen(), packs=False)
    assert states(lm, rows).shape == (0, 32)


def test_only_what_is_known_is_read_this_way() -> None:
    assert not agrees(random_model("llama", "eager", **KINDS["llama"]))
    assert not agrees(random_model("llama", **KINDS["llama"], attention_dropout=0.1))
    assert not agrees(random_model("mistral", **(KINDS["mistral"] | {"sliding_window": 4})))
    assert not agrees(random_model("gpt2", **GPT2))
    lm = random_model("llama", **KINDS["llama"])
    lm.reads = agrees(lm)
    assert lm.reads and fits(lm)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(lm)
    lm.forward = lm.model.base_model
    assert not fits(lm)


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention_is_attention(masked: bool) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 5, 5))
    mask = torch.rand(3, 1, 5, 5) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True  # every query reads something
    ours = short_attention(q, k, v, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked, scale=0.3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("short", [0, 64])
def test_long_and_short_rows_agree(monkeypatch, short: int) -> None:
    monkeypatch.setattr(reading, "SHORT", short)
    lm = wrap(qwen(), packs=False)
    lm.reads = True
    weights = torch.randn(sum(len(r.trained_index) for r in ROLLOUTS), 32, dtype=torch.float64)
    (ours, grads), (theirs, expected) = both_ways(lm, False, weights)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=0, atol=1e-5 * float(expected[name].abs().max()), msg=name
        )
