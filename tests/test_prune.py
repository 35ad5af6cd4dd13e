"""Prefix drift: overlap, events, reliability, effective length, the length controller, and `prune_opd`.

Hand-made top lists and token ids; numbers by hand from 2604.07804's equations, gradients in float64.
"""

import json
from dataclasses import replace
from math import ceil

import pytest
import torch
from synthetic import identity, logit_gradient, logits, make_step
from test_loop import changed, metrics, run, same, weights

from opdkit.catalogue import build_method
from opdkit.controllers import Controller
from opdkit.drift import events_until, low_overlap, overlap, reliability, reliable, shared_ids, unaccepted
from opdkit.errors import MethodError, ModelError, RecipeError
from opdkit.head import objective
from opdkit.length import LengthControl
from opdkit.method import Method, Term, View
from opdkit.pieces import times
from opdkit.signals import log_ratio, support_gap
from opdkit.step import Layout, Scores, Step


def listed(ours, theirs, *, lengths=None, tokens=None, p=None, dtype=torch.float64) -> Step:
    """A step of which only the top lists matter; `p` are the teacher's probabilities on its list."""
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    n = ours.shape[0]
    lengths = torch.tensor(lengths or [n])
    seq = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    zero = torch.zeros(n, dtype=dtype)
    logp = torch.zeros(theirs.shape, dtype=dtype) if p is None else torch.tensor(p, dtype=dtype).log()
    views = {
        "student": Scores(zero, top_ids=ours, top=torch.zeros(ours.shape, dtype=dtype)),
        "teacher": Scores(zero, top_ids=theirs, top=logp),
    }
    layout = Layout(seq, seq, torch.zeros(len(lengths), dtype=torch.long))
    return Step(layout, torch.zeros(n, dtype=torch.long) if tokens is None else torch.tensor(tokens), views)


def events_step(events, lengths=None, dtype=torch.float64) -> Step:
    """A step in which low_overlap(k=1, below=1) is the given row of 0 and 1."""
    return listed([[0] for _ in events], [[int(e)] for e in events], lengths=lengths, dtype=dtype)


EVENT = low_overlap(k=1, below=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Overlap and events


def test_overlap_counts_common_ids():
    step = listed([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]], [[4, 3, 9, 8], [4, 3, 2, 1], [1, 2, 3, 4]])
    assert overlap(k=4)(step).tolist() == [0.5, 1.0, 0.0]
    assert overlap(k=2)(step).tolist() == [0.0, 0.0, 0.0]  # the first two of both lists only
    assert shared_ids(step, "teacher", 4).tolist() == [2, 4, 0]


def test_overlap_is_symmetric_and_does_not_see_ranks():
    generator = torch.Generator().manual_seed(0)
    ours = torch.stack([torch.randperm(20, generator=generator)[:8] for _ in range(50)])
    theirs = torch.stack([torch.randperm(20, generator=generator)[:8] for _ in range(50)])
    found = overlap(k=8)(listed(ours.tolist(), theirs.tolist()))
    expected = [len(set(a) & set(b)) / 8 for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    assert found.tolist() == expected
    assert torch.equal(found, overlap(k=8)(listed(theirs.tolist(), ours.tolist())))
    assert torch.equal(found, overlap(k=8)(listed(ours.flip(1).tolist(), theirs[:, torch.randperm(8)].tolist())))


EDGES = [(16, 0.7, 12), (10, 0.7, 7), (10, 0.9, 9), (6, 5 / 6, 5), (4, 1.0, 4), (3, 2 / 3, 2)]  # k, below, ids needed


@pytest.mark.parametrize(("k", "below", "least"), EDGES)
def test_a_ratio_equal_to_the_threshold_is_no_event(k, below, least):
    """In float32, 7 / 10 < 0.7 depends on the rounding; ids are counted instead."""
    ours = [list(range(k))] * (k + 1)
    theirs = [list(range(n)) + list(range(100, 100 + k - n)) for n in range(k + 1)]
    for dtype in (torch.float32, torch.bfloat16):
        found = low_overlap(k=k, below=below)(listed(ours, theirs, dtype=dtype))
        assert found.tolist() == [1.0] * least + [0.0] * (k + 1 - least) and found.dtype == dtype


def test_accepted_ids_are_the_fewest_that_reach_the_mass():
    ids, p = [[7, 5, 3, 1]] * 5, [[0.5, 0.25, 0.125, 0.0625]] * 5
    step = listed(ids, ids, tokens=[7, 5, 3, 1, 9], p=p)
    assert unaccepted(k=4, mass=0.75)(step).tolist() == [0, 0, 1, 1, 1]  # reached exactly by two
    assert unaccepted(k=4, mass=0.76)(step).tolist() == [0, 0, 0, 1, 1]
    assert unaccepted(k=4, mass=0.5)(step).tolist() == [0, 1, 1, 1, 1]
    assert unaccepted(k=4, mass=0.99)(step).tolist() == [0, 0, 0, 0, 1]  # the list holds less: all of it
    assert unaccepted(k=2, mass=0.99)(step).tolist() == [0, 0, 1, 1, 1]


def test_teacher_equal_to_student_has_no_event_and_disjoint_lists_have_one_everywhere():
    same_lists = listed([[1, 2], [3, 4]], [[2, 1], [3, 4]])
    assert overlap(k=2)(same_lists).tolist() == [1, 1] and low_overlap(k=2)(same_lists).tolist() == [0, 0]
    step = listed([[1, 2]] * 5, [[3, 4]] * 5)
    event = low_overlap(k=2)
    assert event(step).tolist() == [1] * 5
    fallen = reliability(event=event, drop=0.25, base=0.0)(step)
    assert fallen.tolist() == [0.75, 0.5, 0.25, 0.0, 0.0]  # max(0, 1 - drop t) for t = 1, 2, ...


# ---------------------------------------------------------------------------------------------------------------------
# Reliability and effective length


def test_the_counter_starts_anew_in_every_sequence_and_counts_the_event_at_once():
    step = events_step([0, 1, 0, 1, 1, 0, 0, 1], lengths=[4, 1, 3])
    found = reliability(event=EVENT, drop=0.5, base=0.5)(step)
    assert found.tolist() == [1.5, 1.0, 1.0, 0.5, 1.0, 1.5, 1.5, 1.0]
    assert reliable(event=EVENT, drop=0.5)(step).tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("drop", [0.01, 0.02, 0.03, 0.1, 0.07, 1 / 3, 1 / 7, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reliability_is_used_up_by_a_whole_number_of_events(drop, dtype):
    """1 - drop C is not exactly 0 for most drops; ceil(1 / drop) events are the limit whatever the rounding."""
    from fractions import Fraction

    limit = ceil(1 / Fraction(drop).limit_denominator(1000))
    assert events_until(drop) == limit
    step = events_step([1] * (limit + 3), dtype=dtype)
    left = reliable(event=EVENT, drop=drop)(step)
    fallen = reliability(event=EVENT, drop=drop, base=0.0)(step)
    assert left.tolist() == [1.0] * (limit - 1) + [0.0] * 4 and fallen.dtype == dtype
    assert torch.equal(fallen > 1e-8, left > 0) and not fallen[limit - 1 :].any()
    assert (fallen - (1 - drop * torch.arange(1, limit + 4, dtype=torch.float64)).clamp(0, 1)).abs().max() < 1e-6


def test_the_card_s_float32_numbers():
    found = reliability(event=EVENT, drop=0.01, base=0.0)(events_step([1] * 100, dtype=torch.float32))
    assert found[98].item() == pytest.approx(0.01, abs=1e-7) and found[99].item() == 0.0


def test_half_precision_counts_beyond_256_events():
    left = reliable(event=EVENT, drop=0.002)(events_step([1] * 600, dtype=torch.bfloat16))
    assert int(left.double().sum()) == 499


def test_reliability_never_rises_and_stays_within_its_bounds():
    events = (torch.rand(400, generator=torch.Generator().manual_seed(3)) < 0.3).tolist()
    found = reliability(event=EVENT, drop=0.02, base=0.25)(events_step(events))
    assert (found.diff() <= 0).all() and found.min() == 0.25 and found.max() <= 1.25
    effective = int(reliable(event=EVENT, drop=0.02)(events_step(events)).sum())
    assert sum(events[:effective]) == 49 and events[effective]  # E ends with the 50th event


def test_without_events_or_without_drop_the_weight_is_constant():
    step = events_step([0] * 6)
    assert reliability(event=EVENT, drop=0.01, base=0.5)(step).tolist() == [1.5] * 6
    step = events_step([1] * 6)
    assert reliability(event=EVENT, drop=0.0, base=0.0)(step).tolist() == [1.0] * 6
    assert events_until(0.0) is None and reliable(event=EVENT, drop=0.0)(step).tolist() == [1.0] * 6


def test_lists_that_are_too_short_are_said():
    step = listed([[1, 2]] * 2, [[1, 2]] * 2)
    with pytest.raises(MethodError, match=r"compares the 4 most probable ids, but view 'student' records 2; lower k"):
        overlap(k=4)(step)
    bare = replace(step, views={**step.views, "teacher": Scores(step.views["student"].sampled)})
    with pytest.raises(MethodError, match="view 'teacher' records 0"):
        overlap(k=2)(bare)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: overlap(k=0), "at least 1 id"),
    (lambda: low_overlap(below=0.0), "above 0"),
    (lambda: low_overlap(below=1.1), "at most 1"),
    (lambda: unaccepted(mass=0.0), "probability"),
    (lambda: reliability(event=EVENT, drop=1.5), "from 0 to 1"),
    (lambda: reliability(event=EVENT, base=-0.1), "at least 0"),
    (lambda: reliable(event=support_gap()), "one number per token"),
])  # fmt: skip
def test_wrong_arguments_of_pieces(make, said):
    with pytest.raises(MethodError, match=said):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# The method


def sequence_step(method, n=12, v=20, *, lengths=(7, 5), seed=0, near=0.5):
    p = logits(n, v, seed=seed)
    q = p + near * logits(n, v, seed=seed + 1)
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    layout = Layout(seq, seq, torch.zeros(len(lengths), dtype=torch.long))
    return p, make_step(method, p, q, torch.arange(n) % v, layout=layout)


def test_no_events_is_exactly_one_and_a_half_times_topk_opd():
    prune, plain = build_method("prune_opd", {"k": 20, "gamma": 0.9}), build_method("topk_opd", {"k": 20})
    p, step = sequence_step(prune)  # all 20 ids are in both lists
    assert (prune.terms[0].signal(step) - 1.5 * plain.terms[0].signal(step)).abs().max() < 1e-15
    loss, gradient = logit_gradient(prune, p, step)
    other_loss, other = logit_gradient(plain, p, step)
    assert (gradient - 1.5 * other).abs().max() < 1e-15 and abs(loss - 1.5 * other_loss) < 1e-14


@pytest.mark.parametrize("arguments", [{"drop": 0.0, "base": 0.0, "k": 4}, {"base": 0.0, "k": 4, "gamma": 1e-4}])
def test_nothing_to_drop_is_topk_opd_bit_for_bit(arguments):
    prune, plain = build_method("prune_opd", arguments), build_method("topk_opd", {"k": 4})
    p, step = sequence_step(prune)
    ours, theirs = logit_gradient(prune, p, step), logit_gradient(plain, p, step)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_gradient_is_the_card_s():
    """- mean_t sum_v A_t(v) grad log p(v), written out with python sets and loops."""
    method = build_method("prune_opd", {"k": 4, "gamma": 0.8, "drop": 0.25, "base": 0.5})
    p, step = sequence_step(method, near=1.0)
    q = p + 1.0 * logits(12, 20, seed=1)
    leaf = p.clone().requires_grad_(True)
    logp, logq = leaf.log_softmax(-1), q.log_softmax(-1)
    loss, count, before, seen = torch.zeros(()), 0, -1, []
    for t in range(12):
        if int(step.layout.seq[t]) != before:
            before, count = int(step.layout.seq[t]), 0
        ours, theirs = (set(x[t].topk(4).indices.tolist()) for x in (p, q))
        count += len(ours & theirs) / 4 < 0.8
        weight = min(max(1 - 0.25 * count, 0.0), 1.0) + 0.5
        seen.append(weight)
        ids = sorted(ours)
        share = logp[t, ids].softmax(0).detach()
        advantage = weight * share * (logq[t, ids] - logp[t, ids]).detach()
        loss = loss - (advantage * logp[t, ids]).sum() / 12
    assert len(set(seen)) >= 4
    assert reliability(event=low_overlap(k=4, below=0.8), drop=0.25, base=0.5)(step).tolist() == seen
    (expected,) = torch.autograd.grad(loss, leaf)
    assert (logit_gradient(method, p, step)[1] - expected).abs().max() < 1e-14


def test_the_gradient_with_accepted_sets_is_the_card_s():
    """The stricter event: the sampled token is outside the teacher's fewest ids that hold half of the mass, at most 4."""
    method = build_method("prune_opd", {"k": 4, "event": "accept", "accept": 0.5, "drop": 0.25, "base": 0.1})
    p, step = sequence_step(method, near=1.0)
    leaf = p.clone().requires_grad_(True)
    logp, logq = leaf.log_softmax(-1), (p + 1.0 * logits(12, 20, seed=1)).log_softmax(-1)
    loss, count, before, seen = torch.zeros(()), 0, -1, []
    for t in range(12):
        if int(step.layout.seq[t]) != before:
            before, count = int(step.layout.seq[t]), 0
        ranked, accepted, mass = logq[t].sort(descending=True).indices[:4].tolist(), set(), 0.0
        for token in ranked:
            if mass < 0.5:
                accepted.add(token)
                mass += float(logq[t, token].exp())
        count += int(step.tokens[t]) not in accepted
        weight = min(max(1 - 0.25 * count, 0.0), 1.0) + 0.1
        seen.append(weight)
        ids = p[t].topk(4).indices
        advantage = weight * logp[t, ids].softmax(0).detach() * (logq[t, ids] - logp[t, ids]).detach()
        loss = loss - (advantage * logp[t, ids]).sum() / 12
    assert len(set(seen)) > 2 and seen.count(0.1) < 9
    (expected,) = torch.autograd.grad(loss, leaf)
    assert (logit_gradient(method, p, step)[1] - expected).abs().max() < 1e-14


def test_after_the_limit_the_reward_goes_on_at_base_and_every_token_is_counted():
    method = build_method("prune_opd", {"k": 4, "gamma": 1.0, "drop": 1.0, "base": 0.5})
    p, step = sequence_step(method, near=4.0)
    gone = reliable(event=low_overlap(k=4, below=1.0), drop=1.0)(step) == 0
    gradient = logit_gradient(method, p, step)[1]
    plain = logit_gradient(build_method("topk_opd", {"k": 4}), p, step)[1]
    assert gone.sum() > 6 and (gradient[gone] - 0.5 * plain[gone]).abs().max() < 1e-15
    silent = logit_gradient(build_method("prune_opd", {"k": 4, "gamma": 1.0, "drop": 1.0, "base": 0.0}), p, step)[1]
    assert not silent[gone].any() and (silent[~gone] - plain[~gone]).abs().sum() < 1e-14  # still a mean over all tokens


def test_a_weight_of_zero_leaves_the_count_of_a_term():
    fade = reliability(event=low_overlap(k=4, below=0.5), drop=1.0, base=0.0)
    method = Method(name="faded", views={"teacher": View("teacher")}, terms=(Term(signal=log_ratio(), weight=fade),))
    p, step = sequence_step(method, near=2.0)
    kept = fade(step) > 0
    inside = Method(name="inside", views={"teacher": View("teacher")}, terms=(Term(signal=times(log_ratio(), fade)),))
    ratio = logit_gradient(method, p, step)[1][kept] / logit_gradient(inside, p, step)[1][kept]
    assert int(kept.sum()) == 3 and (ratio - 12 / 3).abs().max() < 1e-12


def test_reliability_weighs_any_sampled_token_method():
    fade = reliability(event=unaccepted(k=8, mass=0.9), drop=0.3)
    method = Method(name="m", views={"teacher": View("teacher")}, terms=(Term(signal=log_ratio(), weight=fade),))
    assert method.top_list == 8 and Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    plain = Method(name="p", views={"teacher": View("teacher")}, terms=(Term(signal=log_ratio()),))
    p, step = sequence_step(method, near=2.0)
    rows = fade(step)[:, None] * logit_gradient(plain, p, step)[1]
    assert len(set(fade(step).tolist())) > 2 and (logit_gradient(method, p, step)[1] - rows).abs().max() < 1e-15


def test_nothing_here_carries_a_gradient():
    method = build_method("prune_opd", {"k": 4})
    p, step = sequence_step(method)
    leaf = p.clone().requires_grad_(True)
    from synthetic import terms_of

    loss, _ = objective(leaf, identity(20), terms_of(method, step), None)
    loss.backward()
    assert not method.terms[0].signal(step).requires_grad and leaf.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# The length controller


def control(**settings) -> LengthControl:
    return LengthControl(reliable(event=EVENT), **settings)


def pairs(effective, window=1000) -> torch.Tensor:
    return torch.tensor([[e, window] for e in effective], dtype=torch.float64).flatten()


def follow(c: LengthControl, batches, window=1000):
    state, limits = c.init(), []
    for effective in batches:
        state = c.update(state, pairs(effective, window))
        limits.append(state["limit"])
    return limits, state


def test_it_is_a_controller_and_measures_the_effective_length():
    c = control(start=10, least=5)
    assert isinstance(c, Controller) and c.needs() == ("student.top:1", "teacher.top:1")
    step = replace(events_step([0, 1, 1, 0, 0, 0], lengths=[4, 2]), horizon=50)
    assert LengthControl(reliable(event=EVENT, drop=0.5)).measure(step).tolist() == [2.0, 50.0, 2.0, 50.0]
    assert c.measure(step).tolist() == [4.0, 50.0, 2.0, 50.0]
    assert c.metrics(c.init()) == {"limit": 10.0, "hits": 0.0, "effective": 0.0}


def test_the_released_rule_step_by_step():
    c = control(start=200, least=100, most=500, step=100, margin=50, hits=0.5, patience=2)
    batches = [[150, 0], [249, 249], [250, 0], [0, 0], [350, 0], [349, 349], [349, 0], [0, 0], [0, 0]]
    #  boundary 150 | 250 miss | 250 hit | 350 miss | 350 hit (one miss forgotten) | 450 miss | 450 miss: shrink | ...
    assert follow(c, batches)[0] == [300, 300, 400, 400, 500, 500, 400, 400, 300]


def test_hits_are_compared_with_at_least():
    c = control(start=200, least=100, step=10, margin=0, hits=0.1, patience=1)
    assert follow(c, [[200] + [0] * 9])[0] == [210]
    assert follow(c, [[200] + [0] * 10])[0] == [190]
    assert follow(c, [[199.0] * 10])[0] == [190]


def test_growth_forgets_the_misses_and_shrinking_too():
    c = control(start=300, least=100, step=10, margin=0, hits=1.0, patience=3)
    limits, state = follow(c, [[0], [0], [300], [0], [0]])
    assert limits == [300, 300, 310, 310, 310] and state["misses"] == 2
    limits, state = follow(c, [[0]] * 7)
    assert limits == [300, 300, 290, 290, 290, 280, 280] and state["misses"] == 1


def test_the_limit_stays_between_its_bounds():
    c = control(start=150, least=100, most=180, step=100, margin=0, hits=1.0, patience=1)
    assert follow(c, [[0], [0], [180], [180], [0]])[0] == [100, 100, 180, 180, 100]
    assert control(start=1, least=50).init()["limit"] == 50
    assert control(start=900, least=50, most=80).init()["limit"] == 80
    above = control(start=500, least=50, step=10, margin=0)
    assert follow(above, [[60]], window=60)[0] == [60]  # of sampling.max_new_tokens = 60


def test_the_boundary_is_not_below_the_least_limit():
    c = control(start=100, least=100, most=200, step=10, margin=50, hits=1.0, patience=9)
    assert follow(c, [[99], [100]])[0] == [100, 110]


def test_full_lengths_grow_by_a_step_until_the_cap():
    c = control(start=30, least=20, most=100, step=15, margin=5)
    limits, state = [], c.init()
    while state["limit"] < 100:
        state = c.update(state, pairs([state["limit"]] * 4))
        limits.append(state["limit"])
    assert limits == [45, 60, 75, 90, 100] and len(limits) == ceil((100 - 30) / 15)


def test_a_reliable_but_short_rollout_is_a_miss():
    assert follow(control(start=300, least=100, step=100, margin=10, patience=1), [[80] * 8] * 3)[0] == [200, 100, 100]


@pytest.mark.parametrize(("settings", "said"), [
    ({"least": 0}, "1 <= least <= most"),
    ({"least": 10, "most": 9}, "1 <= least <= most"),
    ({"step": 0}, "1 or more"),
    ({"margin": -1}, "margin of 0 or more"),
    ({"patience": 0}, "1 or more"),
    ({"hits": 0.0}, "above 0"),
])  # fmt: skip
def test_wrong_settings_of_the_controller(settings, said):
    with pytest.raises(MethodError, match=said):
        control(**settings)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


WINDOW = {"start": 4, "least": 3, "step": 2, "margin": 1, "hits": 0.25, "patience": 2}
KEYS = ("loss", "drift", "reliability", "response_length", "length/limit", "length/hits", "length/effective")


@pytest.fixture
def prune_data(recipe_data):
    """A drop of 1 / 3: three events use a rollout up, as random teachers give within eight tokens."""
    data = recipe_data | {"method": {"name": "prune_opd", "k": 8, "gamma": 0.3, "drop": 0.34, **WINDOW}}
    return changed(data, sampling__max_new_tokens=12, eval__kl_prompts=0, eval__teacher=False)


def test_a_run_records_the_lists_that_the_method_compares(prune_data):
    assert prune_data["log"]["top_k"] == 4 < prune_data["method"]["k"]
    rows = metrics(run(prune_data))
    assert all(0 < row["drift"] < 1 and 0.5 <= row["reliability"] < 1.5 for row in rows)
    limits = [4.0, *(row["length/limit"] for row in rows)]
    assert len(set(limits)) > 1
    assert all(row["response_length"] <= limit for row, limit in zip(rows, limits, strict=False))


def test_a_run_without_drift_is_topk_opd_bit_for_bit(prune_data, tmp_path):
    still = {"name": "prune_opd", "k": 8, "drop": 0.0, "base": 0.0, "adapt": False}
    ours = run(prune_data, method=still, output=str(tmp_path / "a"))
    plain = run(prune_data, method={"name": "topk_opd", "k": 8}, output=str(tmp_path / "b"))
    assert same(weights(ours), weights(plain))


def test_a_run_that_stopped_in_the_controller_s_life_goes_on_exactly(prune_data, tmp_path):
    whole = run(prune_data, train__steps=5, output=str(tmp_path / "whole"))
    part = run(prune_data, train__steps=3, output=str(tmp_path / "part"))
    run(prune_data, train__steps=5, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part))
    assert [[row[k] for k in KEYS] for row in metrics(whole)] == [[row[k] for k in KEYS] for row in metrics(part)]


@pytest.mark.parametrize(("method", "error", "said"), [
    ({"least": 12}, RecipeError, r"at 12 tokens or more, and at most 12 are allowed"),
    ({"most": 50}, RecipeError, r"grow to 50 tokens, but sampling.max_new_tokens is 12"),
    ({"k": 60}, ModelError, r"compares the 60 most probable ids .* vocabulary has 44; lower k"),
    ({"accept": 0.9}, RecipeError, "belongs to event"),
    ({"adapt": False}, RecipeError, "no effect with adapt false"),
    ({"drop": 0.0, "stop_every": 4}, RecipeError, "stop_every = 4 has no effect"),
    ({"stop_every": 12}, RecipeError, r"after every 12 tokens, and sampling.max_new_tokens is 12, so it would never look"),
])  # fmt: skip
def test_settings_without_effect_are_errors(prune_data, method, error, said):
    with pytest.raises(error, match=said):
        run(prune_data, method=prune_data["method"] | method)
