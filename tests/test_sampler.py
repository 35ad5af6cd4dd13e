"""The sampler: what it records, which tokens it draws and what work it does."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import make_tokenizer

from opdkit.config import ModelConfig
from opdkit.divergences import NO_MASS
from opdkit.errors import DataError, ModelError, NonFiniteError, RecipeError
from opdkit.head import Head
from opdkit.models import LanguageModel, load_model
from opdkit.rollouts.cache import BufferLayer
from opdkit.rollouts.decoder import compaction
from opdkit.rollouts.draw import Cut, Other, draw, inverse_cdf, largest, truncate
from opdkit.rollouts.sampler import Keep, Mixture, Sampling, noise, prompt_keys, sample
from opdkit.rollouts.stopping import StopStrings

PROMPTS = [[5, 9, 30], [7], [12, 3, 8, 20, 4, 11], [5, 9, 30, 2]]
HOW = Sampling(group=3, max_new_tokens=12, eos_ids=(1, 3, 10, 12, 17, 28, 40))  # many, so that lengths differ


@pytest.fixture(scope="module")
def teacher(teacher_path) -> LanguageModel:
    return load_model(ModelConfig(path=teacher_path), "teacher")


def forced(lm, prompt, ids, temperature=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T, V] and last hidden states [T, D] of one full forward over prompt and response, without a cache."""
    with torch.no_grad():
        out = lm.model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True)
    at = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
    logits = out.logits[0, at, : lm.vocab].double() / temperature
    return logits.log_softmax(-1), out.hidden_states[-1][0, at]


def ids_of(groups) -> list[list[tuple[int, ...]]]:
    return [[s.ids for s in group] for group in groups]


def flat(groups) -> list:
    return [item for group in groups for item in group]


@contextmanager
def head_rows(lm, rows, values):
    """Other numbers in some rows of the vocabulary head, for the duration of the block."""
    weight = lm.model.get_output_embeddings().weight.data
    kept = weight.clone()
    weight[rows] = values
    try:
        yield
    finally:
        weight.copy_(kept)


# ---------------------------------------------------------------------------------------------------------------------
# What is recorded


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_capture_equals_a_teacher_forced_forward(lm, temperature):
    how = replace(HOW, temperature=temperature)
    groups = sample(lm, PROMPTS, how, 3, Keep(top_k=5, hidden=True))
    lengths = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 3
        for s in group:
            logp, hidden = forced(lm, prompt, s.ids, temperature)
            c, tokens = s.capture, torch.tensor(s.ids)[:, None]
            assert (c.logp - logp.gather(1, tokens).squeeze(1)).abs().max() <= 1e-5
            assert torch.equal(c.behaviour, c.logp)
            assert (c.entropy + (logp.exp() * logp).sum(-1)).abs().max() <= 1e-5
            assert (c.top - logp.topk(5).values).abs().max() <= 1e-5
            assert (logp.gather(1, c.top_ids) - logp.topk(5).values).abs().max() <= 1e-5
            assert (c.hidden - hidden).abs().max() <= 1e-5
            lengths.add(len(s.ids))
    assert len(lengths) > 2  # rows did leave the batch at different times


def test_half_precision_forwards_record_in_float32(lm):
    with torch.autocast("cpu", torch.bfloat16):
        groups = sample(lm, PROMPTS, HOW, 3, Keep(top_k=lm.vocab))
    for s in flat(groups):
        c = s.capture
        assert {c.logp.dtype, c.behaviour.dtype, c.entropy.dtype, c.top.dtype} == {torch.float32}
        assert (c.entropy + (c.top.exp() * c.top).sum(-1)).abs().max() <= 1e-5


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.7), (6, 0.8)])
def test_truncation_records_both_distributions(lm, top_k, top_p):
    groups = sample(lm, PROMPTS, replace(HOW, top_k=top_k, top_p=top_p), 4)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for s in group:
            logp, _ = forced(lm, prompt, s.ids)
            tokens = torch.tensor(s.ids)[:, None]
            kept = torch.stack([slow_truncation(row, top_k, top_p) for row in logp])
            assert (s.capture.logp - logp.gather(1, tokens).squeeze(1)).abs().max() <= 1e-5
            assert (s.capture.behaviour - kept.gather(1, tokens).squeeze(1)).abs().max() <= 1e-5


def slow_truncation(logp, top_k, top_p):
    """top_k, then the smallest set whose share of the rest reaches top_p, one row at a time; dropped = -inf."""
    order = logp.argsort(descending=True).tolist()[: top_k or None]
    p = logp[order].exp() / logp[order].exp().sum()
    keep, mass = [], 0.0
    for i, share in zip(order, p.tolist(), strict=True):
        if mass < top_p:
            keep.append(i)
        mass += share
    out = torch.full_like(logp, -torch.inf)
    out[keep] = logp[keep] - logp[keep].logsumexp(0)
    return out


def test_truncate_by_hand():
    logp = torch.tensor([[0.15, 0.5, 0.1, 0.25]]).log()
    ids, kept = truncate(logp, 0, 0.7)  # 0.5 is not enough, 0.75 is
    assert ids.tolist() == [[1, 3, 0, 2]]
    torch.testing.assert_close(kept, torch.tensor([[2 / 3, 1 / 3, 0, 0]]).log().clamp(min=NO_MASS))
    ids, kept = truncate(logp, 3, 1.0)
    torch.testing.assert_close(kept, torch.tensor([[5 / 9, 2.5 / 9, 1.5 / 9]]).log())
    ids, kept = truncate(logp, 3, 0.8)  # of the three: 0.556, 0.833
    torch.testing.assert_close(kept, torch.tensor([[2 / 3, 1 / 3, 0]]).log().clamp(min=NO_MASS))


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_a_nucleus_larger_than_the_first_look_is_complete(scale):
    logp = (torch.randn(3, 900, generator=torch.Generator().manual_seed(0)) * scale).log_softmax(-1)
    ids, kept = truncate(logp, 0, 0.9)
    full = torch.full_like(logp, NO_MASS).scatter(1, ids, kept)
    slow = torch.stack([slow_truncation(row, 0, 0.9) for row in logp]).clamp(min=NO_MASS)
    torch.testing.assert_close(full, slow)
    assert ((full > NO_MASS).sum(-1) > 300).all() == (scale < 1)


# ---------------------------------------------------------------------------------------------------------------------
# Determinism


@pytest.mark.parametrize("max_rows", [1, 2, 4, 7])
def test_samples_do_not_depend_on_the_batch(lm, max_rows):
    together = sample(lm, PROMPTS, HOW, 5)
    apart = sample(lm, PROMPTS, replace(HOW, max_rows=max_rows), 5)
    assert ids_of(apart) == ids_of(together)
    for a, b in zip(flat(apart), flat(together), strict=True):
        assert (a.capture.logp - b.capture.logp).abs().max() <= 1e-5


def test_samples_do_not_depend_on_the_order_of_prompts_or_on_the_other_rows(lm):
    base = ids_of(sample(lm, PROMPTS, HOW, 5))
    order = [2, 0, 3, 1]
    assert ids_of(sample(lm, [PROMPTS[i] for i in order], HOW, 5)) == [base[i] for i in order]
    assert ids_of(sample(lm, PROMPTS[1:2], HOW, 5)) == base[1:2]
    assert ids_of(sample(lm, PROMPTS, replace(HOW, group=2), 5)) == [group[:2] for group in base]
    shorter = ids_of(sample(lm, PROMPTS, replace(HOW, max_new_tokens=4), 5))
    assert shorter == [[ids[:4] for ids in group] for group in base]


def test_seeds_and_equal_prompts(lm):
    base = ids_of(sample(lm, PROMPTS, HOW, 5))
    assert ids_of(sample(lm, PROMPTS, HOW, 5)) == base
    other = ids_of(sample(lm, PROMPTS, HOW, 6))
    assert all(a != b for a, b in zip(base, other, strict=True))
    twice = ids_of(sample(lm, [PROMPTS[0], PROMPTS[0]], HOW, 5))
    assert twice[0] == base[0]
    assert twice[1] != base[0]
    assert len(set(base[0])) == 3  # the members of a group differ


def test_sampling_leaves_torch_random_state_and_the_model_alone(lm):
    before, training = torch.get_rng_state(), lm.model.training
    sample(lm, PROMPTS, HOW, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert lm.model.training == training


# ---------------------------------------------------------------------------------------------------------------------
# The distribution


def chi_square(counts, p) -> float:
    """(statistic - degrees of freedom) / its standard deviation, cells expected below 5 merged into one."""
    n = counts.sum()
    small = p * n < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([p[~small], p[small].sum()[None]]) * n
    observed, expected = observed[expected > 0], expected[expected > 0]
    df = observed.shape[0] - 1
    return float((((observed - expected) ** 2 / expected).sum() - df) / (2 * df) ** 0.5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (0, 1.0, 2.0), (7, 1.0, 1.0), (0, 0.8, 1.5)]
)
def test_first_tokens_follow_the_softmax(lm, top_k, top_p, temperature):
    how = Sampling(3000, 1, temperature, top_p, top_k, max_rows=3000)
    (group,) = sample(lm, [PROMPTS[0]], how, 11)
    counts = torch.bincount(torch.tensor([s.ids[0] for s in group]), minlength=lm.vocab).double()
    logp, _ = forced(lm, PROMPTS[0], (0,), temperature)
    p = slow_truncation(logp[0], top_k, top_p).exp() if top_k or top_p < 1 else logp[0].exp()
    assert (counts[p == 0] == 0).all()
    assert chi_square(counts, p) < 4
    assert chi_square(counts, p.roll(1)) > 40  # the test can fail


def test_padded_ids_are_never_drawn(lm):
    with head_rows(lm, slice(lm.vocab, None), 50.0):
        groups = sample(lm, PROMPTS, replace(HOW, temperature=3.0), 5, Keep(top_k=lm.vocab))
    for s in flat(groups):
        assert max(s.ids) < lm.vocab
        assert s.capture.top_ids.max() < lm.vocab
        assert (s.capture.top.double().exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("vocab", [6, 1024, 1025, 5000])
def test_edges_of_the_inverse_cdf(vocab):
    below_one = 1 - 2**-53
    p = torch.zeros(1, vocab)
    p[0, 2], p[0, vocab - 3] = 0.3, 0.9
    u = torch.tensor([0.0, 0.25 - 1e-6, 0.25 + 1e-6, below_one], dtype=torch.float64)
    assert inverse_cdf(p.expand(4, vocab), u).tolist() == [2, 2, vocab - 3, vocab - 3]
    flat = torch.full((2, vocab), 1 / vocab)
    assert inverse_cdf(flat, u[[0, 3]]).tolist() == [0, vocab - 1]
    for last in (0, vocab - 1):
        single = torch.zeros(4, vocab)
        single[:, last] = 1e-30
        assert inverse_cdf(single, u).tolist() == [last] * 4


def test_the_segmented_inverse_cdf_equals_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    p = (torch.randn(200, 3333, generator=generator, dtype=torch.float64) * 3).softmax(-1)
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    plain = torch.searchsorted(p.cumsum(-1), u[:, None], right=True).squeeze(1)
    assert torch.equal(inverse_cdf(p, u), plain)
    assert (inverse_cdf(p.float(), u) == plain).float().mean() > 0.98  # float32 masses move the borders a little


def test_rows_of_a_large_vocabulary_are_drawn_in_blocks_alike():
    generator = torch.Generator().manual_seed(1)
    head = Head(torch.randn(40_000, 8, generator=generator).double())  # float32 rounds one row unlike twenty
    hidden, u = (
        torch.randn(20, 8, generator=generator).double(),
        torch.rand(20, generator=generator, dtype=torch.float64),
    )
    together = draw(head, hidden, u, Cut(keep_top=3))
    for i in range(20):
        for a, b in zip(together, draw(head, hidden[i : i + 1], u[i : i + 1], Cut(keep_top=3)), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [7, 3000, 3001, 3063])
def test_the_largest_entries_of_a_large_vocabulary(vocab):
    z = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    z[0, -3:] = torch.tensor([7.0, 9.0, 8.0])  # beyond the last whole segment, for some sizes
    z[1, 0:4] = torch.tensor([7.0, 9.0, 8.0, 6.0])  # all in one segment
    values, ids = largest(z, 4)
    expected = z.topk(4)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_greedy_equals_generate(lm):
    how = Sampling(1, 15, temperature=0.0)
    for prompt, (s,) in zip(PROMPTS, sample(lm, PROMPTS, how, 0), strict=True):
        out = lm.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=15)
        assert list(s.ids) == out[0, len(prompt) :].tolist()
        logp, _ = forced(lm, prompt, s.ids)
        assert (s.capture.logp - logp.max(-1).values).abs().max() <= 1e-5
        assert s.capture.behaviour.tolist() == [0.0] * len(s.ids)  # it is certain


# ---------------------------------------------------------------------------------------------------------------------
# Where responses end


def test_several_eos_ids(lm):
    free = ids_of(sample(lm, PROMPTS, replace(HOW, eos_ids=(0,)), 5))
    ends = (free[0][0][2], free[2][1][4])
    stopped = sample(lm, PROMPTS, replace(HOW, eos_ids=ends), 5)
    reasons = set()
    for long, s in zip(flat(free), flat(stopped), strict=True):
        at = next((i for i, token in enumerate(long) if token in ends), None)
        assert s.ids == (long if at is None else long[: at + 1])
        if 0 not in long:
            assert s.finish == ("length" if at is None else "stop")
        reasons.add(s.finish)
    assert reasons == {"stop", "length"}


def test_eos_is_kept_as_a_token_but_not_in_the_text(lm):
    own = replace(HOW, eos_ids=(), temperature=3.0)  # none given: the model's own
    ended = [s for s in flat(sample(lm, PROMPTS * 4, own, 5)) if s.finish == "stop"]
    assert ended
    for s in ended:
        assert s.ids[-1] == 1
        assert s.text == lm.tokenizer.decode(s.ids[:-1], skip_special_tokens=True)
        assert s.capture.logp.shape == (len(s.ids),)


def test_a_stop_string_spans_tokens_and_cuts_the_text(lm):
    free = [s for s in flat(sample(lm, PROMPTS, replace(HOW, eos_ids=(0,)), 5)) if s.finish == "length"]
    target = free[0].text[3:6]  # one character a token
    stopped = sample(lm, PROMPTS, replace(HOW, eos_ids=(0,), stop=("\x00", target, target + "!")), 5)
    match = next(s for s in flat(stopped) if s.ids == free[0].ids[: len(s.ids)] and s.finish == "stop_string")
    begin = free[0].text.find(target)
    assert match.ids == free[0].ids[: begin + 3]
    assert match.text == free[0].text[:begin]
    assert match.capture.logp.shape == (begin + 3,)
    for long, s in zip(flat(sample(lm, PROMPTS, replace(HOW, eos_ids=(0,)), 5)), flat(stopped), strict=True):
        if target not in long.text:
            assert (s.ids, s.finish) == (long.ids, long.finish)


def test_eos_wins_over_a_stop_string(lm):
    (group,) = sample(lm, PROMPTS[:1], replace(HOW, eos_ids=(0,), group=1), 5)
    s = group[0]
    last = next(i for i in range(2, 12) if s.ids[i] not in s.ids[:i])  # ends a new two-character string
    how = replace(HOW, group=1, stop=(s.text[last - 1 : last + 1],), eos_ids=(s.ids[last],))
    ((both,),) = sample(lm, PROMPTS[:1], how, 5)
    assert (both.ids, both.finish, both.text) == (s.ids[: last + 1], "stop", s.text[: last + 1])


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("before", ["", "a", "long text with äöü " * 9])
def test_stop_strings_of_several_bytes_per_character(before):
    tokenizer = byte_tokenizer()
    stop = "→é\n"  # six bytes, six tokens
    ids = tokenizer.encode(before + stop + "x")
    stopping = StopStrings(tokenizer, (stop, "never"))
    hits = []
    for token in ids:
        now = torch.tensor([3]), torch.tensor([token]), torch.tensor([False])
        hits.append(bool(stopping.completed(*now)))
        stopping.completed(torch.tensor([3]), torch.tensor([256]), torch.tensor([False]))  # special: adds no text
    assert hits == [False] * (len(ids) - 2) + [True, False]
    assert stopping.texts == {3: before}


# ---------------------------------------------------------------------------------------------------------------------
# Work that is not done


def count_rows(lm, monkeypatch):
    """Rows of every forward of the decoder, and rows that reach the vocabulary head."""
    forwards, heads = [], []
    handle = lm.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    logits = Head.logits

    def counted(head, hidden):
        heads.append(hidden.shape[0])
        return logits(head, hidden)

    monkeypatch.setattr(Head, "logits", counted)
    return forwards, heads, handle


def test_one_prefill_per_prompt_and_finished_rows_leave(lm, monkeypatch):
    forwards, heads, handle = count_rows(lm, monkeypatch)
    groups = sample(lm, PROMPTS, HOW, 5)
    handle.remove()
    lengths = [len(s.ids) for group in groups for s in group]
    live = [sum(n > t for n in lengths) for t in range(max(lengths))]
    assert forwards[0] == (len(PROMPTS), 6)  # prompts, not rows; the longest has six tokens
    assert forwards[1:] == [(n, 1) for n in live[1:]]  # each token that is fed belongs to an unfinished row
    assert heads == live  # one row of logits for each sampled token: no prompt position among them
    assert min(live) < max(live)


def test_a_group_larger_than_max_rows_is_split(lm, monkeypatch):
    forwards, heads, handle = count_rows(lm, monkeypatch)
    sample(lm, PROMPTS, replace(HOW, max_rows=2), 5)
    handle.remove()
    assert max(heads) == 2
    assert max(rows for rows, _ in forwards) <= 2


def test_compaction_moves_the_last_rows_into_the_gaps():
    assert compaction(torch.tensor([False, True, False, True, False, False])).tolist() == [0, 4, 2, 5]
    assert compaction(torch.tensor([True, True, False])).tolist() == [2]
    assert compaction(torch.tensor([False, True, True])).tolist() == [0]


def test_the_buffer_cache_equals_transformers_cache():
    from transformers.cache_utils import DynamicLayer

    generator = torch.Generator().manual_seed(0)
    ours, theirs = BufferLayer(), DynamicLayer()
    rows, orders = 2, {0: [0, 0, 0, 1, 1, 1], 3: [5, 1, 2, 4], 70: [3, 1], 71: [1]}
    for t in range(200):  # past two enlargements of the buffer
        new = [torch.randn(rows, 2, 5 if t == 0 else 1, 4, generator=generator) for _ in range(2)]
        for a, b in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(a, b)
        if t in orders:
            index = torch.tensor(orders[t])
            ours.reorder_cache(index)
            theirs.reorder_cache(index)
            rows = len(index)
        assert torch.equal(ours.keys, theirs.keys)
        assert ours.get_seq_length() == t + 5


def test_a_model_that_changes_its_buffers_while_sampling_still_trains():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=44, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=1, original_max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    lm = LanguageModel("student", "random", model, make_tokenizer())
    (group,) = sample(lm, [[3, 4]], Sampling(2, 40, eos_ids=(0,)), 1, Keep(hidden=True))
    loss = -(lm.hidden(torch.tensor([[3, 4, *group[0].ids]])).square().mean()) * group[0].capture.logp.mean()
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert not group[0].capture.hidden.is_inference()


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures with a teacher


def test_a_mixed_draw_by_enumeration():
    """Own (.7, .2, .1), teacher (.1, .3, .6), share .25: mixture (.55, .225, .225), whatever the head's scale."""
    own, theirs = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    u = torch.tensor([0.0, 0.54, 0.56, 0.77, 0.78, 0.999], dtype=torch.float64)
    hidden = torch.ones(6, 1, dtype=torch.float64)
    other = Other(Head(theirs.log()[:, None], scale=2.0, temperature=2.0), hidden, 0.25)
    found = draw(Head(own.log()[:, None]), hidden, u, Cut(keep_top=2), other)
    assert found.tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(found.logp, own.log()[found.tokens])
    torch.testing.assert_close(found.behaviour, torch.tensor([0.55, 0.225, 0.225]).double().log()[found.tokens])
    torch.testing.assert_close(found.entropy, -(own * own.log()).sum().expand(6))
    assert found.top_ids.tolist() == [[0, 1]] * 6  # the record is about the sampling model itself
    # The mixture is what gets truncated. Share .9: (.16, .29, .55), of which .6 needs the last two: 55/84 and 29/84
    single = draw(Head(own.log()[:, None]), hidden, u, Cut(top_k=1), other)
    assert single.tokens.tolist() == [0] * 6 and single.behaviour.abs().max() < 1e-12
    nucleus = draw(Head(own.log()[:, None]), hidden, u, Cut(top_p=0.6), other._replace(share=0.9))
    assert nucleus.tokens.tolist() == [2, 2, 2, 1, 1, 1]
    torch.testing.assert_close(nucleus.behaviour.exp(), torch.tensor([55.0] * 3 + [29.0] * 3).double() / 84)
    greedy = draw(Head(own.log()[:, None]), hidden, u, Cut(greedy=True), other._replace(share=0.9))
    assert greedy.tokens.tolist() == [2] * 6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_mixed_samples_invert_the_mixture_of_both_models(lm, teacher, temperature):
    """Every token is the one at which the exact mixture, from forwards without a cache, exceeds the uniform number."""
    how = replace(HOW, temperature=temperature)
    apart = [[9, 9, *p] for p in PROMPTS]  # the teacher reads other prompts, of other lengths
    mixture = Mixture(teacher, 0.3, apart)
    groups = sample(lm, PROMPTS, how, 3, Keep(top_k=5), mixture=mixture)
    lengths = set()
    for prompt, theirs, key, group in zip(PROMPTS, apart, prompt_keys(PROMPTS, 3), groups, strict=True):
        for j, s in enumerate(group):
            p, _ = forced(lm, prompt, s.ids, temperature)
            q, _ = forced(teacher, theirs, s.ids)
            mixed, tokens = 0.3 * q.exp() + 0.7 * p.exp(), torch.tensor(s.ids)[:, None]
            cdf, u = mixed.cumsum(-1), noise(key, j, how.max_new_tokens)[: len(s.ids), None]
            below = cdf.gather(1, tokens) - mixed.gather(1, tokens)
            assert (below - 1e-5 <= u).all() and (u <= cdf.gather(1, tokens) + 1e-5).all()
            assert (s.capture.behaviour - mixed.log().gather(1, tokens).squeeze(1)).abs().max() <= 1e-5
            assert (s.capture.logp - p.gather(1, tokens).squeeze(1)).abs().max() <= 1e-5
            assert (s.capture.top - p.topk(5).values).abs().max() <= 1e-5
            lengths.add(len(s.ids))
    assert len(lengths) > 2  # rows did leave both batches at different times
    plain = sample(lm, PROMPTS, how, 3)
    assert ids_of(groups) != ids_of(plain)
    for rows in (2, 5):
        assert ids_of(sample(lm, PROMPTS, replace(how, max_rows=rows), 3, mixture=mixture)) == ids_of(groups)


def test_a_share_of_nothing_is_plain_sampling(lm, teacher):
    plain = flat(sample(lm, PROMPTS, HOW, 3, Keep(top_k=5, hidden=True)))
    for share in (0.0, 1e-30):
        for a, b in zip(
            flat(sample(lm, PROMPTS, HOW, 3, Keep(5, True), mixture=Mixture(teacher, share))), plain, strict=True
        ):
            assert (a.ids, a.text, a.finish) == (b.ids, b.text, b.finish)
            for name in ("logp", "behaviour", "entropy", "top_ids", "top", "hidden"):
                assert torch.equal(getattr(a.capture, name), getattr(b.capture, name))


def test_a_mixture_reads_every_prompt_once_with_each_model(lm, teacher, monkeypatch):
    forwards, _, handle = count_rows(teacher, monkeypatch)
    groups = sample(lm, PROMPTS, HOW, 5, mixture=Mixture(teacher, 0.5))
    handle.remove()
    lengths = [len(s.ids) for group in groups for s in group]
    live = [sum(n > t for n in lengths) for t in range(max(lengths))]
    assert forwards == [(len(PROMPTS), 6), *((n, 1) for n in live[1:])]


def test_mixtures_that_cannot_be_sampled_are_refused(lm, teacher):
    with pytest.raises(RecipeError, match=r"share of a mixture is 1\.0; expected 0 to below 1"):
        Mixture(teacher, 1.0)
    other = replace(teacher, tokenizer=make_tokenizer("abc"))
    with pytest.raises(ModelError, match=r"student has 44 token ids and teacher 5: .* cannot be mixed"):
        sample(lm, PROMPTS, HOW, 0, mixture=Mixture(other, 0.5))
    with pytest.raises(DataError, match="prompt 0 has 117 tokens as teacher reads it; expected 1 to 116"):
        sample(lm, PROMPTS, HOW, 0, mixture=Mixture(teacher, 0.5, [[5] * 117] * 4))
    with head_rows(teacher, slice(3, 4), torch.nan), pytest.raises(NonFiniteError, match=r"'teacher'.*while sampling"):
        sample(lm, PROMPTS, HOW, 0, mixture=Mixture(teacher, 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("prompts", "change", "error", "message"),
    [
        ([[5], []], {}, DataError, "prompt 1 has 0 tokens as student reads it; expected 1 to 116"),
        ([[5] * 117], {}, DataError, "prompt 0 has 117 tokens as student reads it; expected 1 to 116"),
        (PROMPTS, {"top_k": 45}, RecipeError, "top-k of 45 exceeds the vocabulary of 44"),
        (PROMPTS, {"stop": ("a", "")}, RecipeError, "empty stop string"),
        (PROMPTS, {"eos_ids": (46, 99)}, RecipeError, r"EOS ids \[46, 99\]"),
    ],
)
def test_what_cannot_be_sampled_is_refused(lm, prompts, change, error, message):
    with pytest.raises(error, match=message):
        sample(lm, prompts, replace(HOW, **change), 0)


def test_a_student_that_returns_nan_is_named(lm):
    with head_rows(lm, slice(3, 4), torch.nan), pytest.raises(NonFiniteError, match=r"'student'.*while sampling"):
        sample(lm, PROMPTS, HOW, 0)


def test_no_prompts_give_no_samples(lm):
    assert sample(lm, [], HOW, 0) == []
