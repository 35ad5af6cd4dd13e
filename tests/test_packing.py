"""Packed rows against padded ones: hidden states, gradients, budgets, and models that cannot be packed."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opdkit.models import LanguageModel, checkpoint_activations
from opdkit.packing import NAME, Stretch, enable, pack, packed_attention
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Problem
from opdkit.views.batches import Batch, batches, group_tokens, pack_batches

SIZES = dict(vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64)  # fmt: skip
PROBLEM = Problem("p", "")


def rollout(prompt: list[int], response: list[int], trained: list[bool] | None = None) -> Rollout:
    return Rollout(
        PROBLEM, tuple(prompt), tuple(response), "", 0, "stop", trained=None if trained is None else tuple(trained)
    )


ROLLOUTS = [
    rollout([3, 4, 5], [6, 7, 8, 9]),
    rollout([3, 4, 5], [1]),
    rollout([3, 4, 5], [9, 2, 2, 9, 9, 1], [True, False, False, True, True, True]),
    rollout([8], [3, 3]),
    rollout([4, 4], [5]),
    rollout([4, 4], [6]),
    rollout([7, 7, 7, 7, 7], [2, 3, 4], [False, True, True]),
    rollout([7, 7, 7, 7, 7], [4, 4, 4, 4, 4]),
]


def wrap(model: torch.nn.Module, packs: bool = True) -> LanguageModel:
    return LanguageModel("m", "random", model, None, packs=packs)


def qwen(heads: int = 2) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, num_key_value_heads=heads)).double().eval()


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_hidden_states_and_gradients_of_a_pack_are_those_of_padded_rows(heads: int) -> None:
    model = qwen(heads)
    assert enable(model)
    lm, order = wrap(model), tuple(range(len(ROLLOUTS)))
    weights = torch.randn(sum(len(r.trained_index) for r in ROLLOUTS), 32, dtype=torch.float64)
    found = {}
    for packed in (False, True):
        model.zero_grad()
        states = Batch(order, packed).states(lm, ROLLOUTS)
        (states * weights).sum().backward()
        found[packed] = states.detach(), [p.grad.clone() for p in model.model.parameters()]
    torch.testing.assert_close(found[True][0], found[False][0], rtol=0, atol=1e-12)
    for a, b in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))  # the model's norms run in float32


def test_attention_over_a_pack_is_masked_attention_to_the_last_digit() -> None:
    torch.manual_seed(0)
    found = pack(ROLLOUTS)
    size = found.ids.shape[1]
    allowed = torch.zeros(size, size, dtype=torch.bool)
    for s in found.stretches:
        block = torch.ones(s.stop - s.start, s.last - s.first, dtype=torch.bool)
        allowed[s.start : s.stop, s.first : s.last] |= block.tril() if s.causal else block
    assert allowed[7].tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False] * (size - 8)  # a second token's keys
    tensors = [torch.randn(1, 2, size, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, size, 2, 8, dtype=torch.float64)
    out, _ = packed_attention(None, *tensors, None, packing=found.stretches, scaling=0.3)
    ours = torch.autograd.grad(out, tensors, grad)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=allowed, scale=0.3).transpose(1, 2)
    theirs = torch.autograd.grad(expected, tensors, grad)
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_gradients_survive_recomputed_activations() -> None:
    model = qwen()
    assert enable(model)
    lm, order = wrap(model), tuple(range(len(ROLLOUTS)))
    grads = []
    for again in (False, True):
        if again:
            checkpoint_activations(model)
            model.train()
        model.zero_grad()
        Batch(order, True).states(lm, ROLLOUTS).square().sum().backward()
        grads.append([p.grad.clone() for p in model.model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_prompt_stands_once_and_no_padding_anywhere() -> None:
    found = pack(ROLLOUTS[:4])
    assert found.ids[0].tolist() == [3, 4, 5, 6, 7, 8, 9, 2, 2, 9, 9, 8, 3]
    assert found.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 0, 1]
    assert found.rows.tolist() == [2, 3, 4, 5, 2, 2, 8, 9, 10, 11, 12]
    assert found.stretches == (
        Stretch(0, 3, 0, 3, True), Stretch(3, 11, 0, 3, False), Stretch(3, 6, 3, 6, True, True),
        Stretch(6, 11, 6, 11, True, True), Stretch(11, 13, 11, 13, True),
    )  # fmt: skip
    assert found.ends.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # from the last token of every prompt on
    assert found.end_stretches == (
        Stretch(0, 9, 0, 3, False), Stretch(1, 4, 3, 6, True, True), Stretch(4, 9, 6, 11, True, True),
        Stretch(9, 11, 11, 12, False), Stretch(10, 11, 12, 13, True, True),
    )  # fmt: skip


def test_responses_of_one_token_need_no_shared_keys() -> None:
    found = pack(ROLLOUTS[4:6])
    assert found.ids[0].tolist() == [4, 4]
    assert found.rows.tolist() == [1, 1]
    assert found.stretches == (Stretch(0, 2, 0, 2, True),)
    assert found.end_stretches == (Stretch(0, 1, 0, 2, False),)


def test_packs_hold_whole_groups_where_they_fit() -> None:
    assert group_tokens(ROLLOUTS) == [14, 14, 14, 3, 4, 4, 13, 13]
    packs, cost = pack_batches(ROLLOUTS, 18)
    assert packs == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cost == 14 + 3 + 4 + 13 + 8 * 32
    assert pack_batches(ROLLOUTS, 8)[0] == [[0, 1], [2], [3, 4, 5], [6], [7]]  # 9 and 10 tokens stand alone


@pytest.mark.parametrize("budget", [1, 7, 9, 10, 16, 40, 1000])
def test_every_rollout_is_in_one_pack_and_packs_keep_their_budget(budget: int) -> None:
    packs, _ = pack_batches(ROLLOUTS, budget)
    assert [i for index in packs for i in index] == list(range(len(ROLLOUTS)))
    for index in packs:
        tokens = pack([ROLLOUTS[i] for i in index]).ids.shape[1]
        assert tokens <= budget or len(index) == 1


def test_the_cheaper_way_is_taken() -> None:
    model = qwen()
    assert enable(model)
    long = [rollout([2] * 40, [3] * (4 * i + 1)) for i in range(8)]  # 960 padded tokens, 160 + 8 x 32 packed
    assert [b.packed for b in batches(wrap(model), long, 10_000)] == [True]
    assert not any(b.packed for b in batches(wrap(model, packs=False), long, 10_000))
    assert not any(b.packed for b in batches(wrap(model), ROLLOUTS, 10_000))  # short rows: calls cost more than padding


def test_models_that_cannot_be_packed_keep_their_attention() -> None:
    window = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)).eval()
    eager = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).eval()
    dropout = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)).eval()
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    for model in (window, eager, dropout, learned):
        before = model.config._attn_implementation
        if not enable(model):
            assert model.config._attn_implementation == before
        else:  # then it must be right
            lm = wrap(model)
            a, b = (Batch(tuple(range(8)), packed).states(lm, ROLLOUTS) for packed in (True, False))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not any(map(enable, (window, eager, dropout)))


def test_llama_packs_and_its_name_is_not_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    assert enable(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_bfloat16_autocast_gives_the_same_states_as_padding() -> None:
    model = qwen().float()
    assert enable(model)
    lm, order = wrap(model), tuple(range(len(ROLLOUTS)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, b = (Batch(order, packed).states(lm, ROLLOUTS) for packed in (True, False))
    torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_the_order_of_a_batch_is_the_order_of_its_states() -> None:
    model = qwen()
    assert enable(model)
    lm = wrap(model)
    whole = Batch(tuple(range(8)), True).states(lm, ROLLOUTS)
    part = Batch((3, 6), True).states(lm, ROLLOUTS)
    starts = [0, 4, 5, 9, 11, 12, 13, 15]  # of each rollout's trained tokens
    torch.testing.assert_close(part, torch.cat([whole[starts[3] : starts[4]], whole[starts[6] : starts[7]]]))
