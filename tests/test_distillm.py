"""DistiLLM: which mixture its skew is, where its responses come from, and a replayed step from end to end."""

import pytest
import torch
from synthetic import logit_gradient, logits, make_step

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig
from opdkit.errors import RecipeError
from opdkit.losses import Divergence
from opdkit.models import load_model
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.replay import ReplayBuffer
from opdkit.rollouts.sampler import Keep, Sampling, prompt_keys
from opdkit.rollouts.sources import Request, Supply
from opdkit.sources import Dataset, OnPolicy, Replay
from opdkit.tasks.problem import Problem, Task
from opdkit.train.checks import split_prompts


def loss_of(arguments, p, q):
    """Its value at two tokens, by hand-given probabilities of student and teacher."""
    method = build_method("distillm", arguments | {"on_policy_share": 1.0, "replay_share": 0.0})
    rows = [torch.stack([x, x]).log() for x in (p, q)]
    step = make_step(method, *rows, torch.zeros(2, dtype=torch.long), top_k=2)
    return logit_gradient(method, rows[0], step)[0].item()


def test_the_skew_is_the_share_of_the_first_argument():
    """p = (.5, .5), q = (.9, .1), skew .1: forward mixes (.54, .46), reverse (.86, .14)."""
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)
    forward = (q * (q / torch.tensor([0.54, 0.46], dtype=torch.float64)).log()).sum().item()
    reverse = (p * (p / torch.tensor([0.86, 0.14], dtype=torch.float64)).log()).sum().item()
    assert loss_of({}, p, q) == pytest.approx(forward, abs=1e-12)
    assert loss_of({"kind": "skew_reverse_kl"}, p, q) == pytest.approx(reverse, abs=1e-12)
    assert build_method("distillm", {"kind": "skew_reverse_kl"}).terms[0].loss == Divergence("skew_reverse_kl", mix=0.9)


def test_gradients_stay_bounded_where_the_plain_divergence_does_not():
    """The student gives the teacher's token e^-80: KL(q, p) costs 80 nats a token, the skewed one at most -log skew."""
    p, q = torch.tensor([[0.0, 80.0]], dtype=torch.float64), torch.tensor([[80.0, 0.0]], dtype=torch.float64)
    tokens = torch.zeros(1, dtype=torch.long)
    for arguments, name, bound in [
        ({}, "distillm", -torch.tensor(0.1).log()),
        ({"kind": "forward_kl"}, "full_opd", None),
    ]:
        extra = {"on_policy_share": 1.0, "replay_share": 0.0} if name == "distillm" else {}
        method = build_method(name, arguments | extra)
        loss, _ = logit_gradient(method, p, make_step(method, p, q, tokens, top_k=2))
        assert (loss <= bound + 1e-12) if bound is not None else loss > 79


def test_shares_and_sources():
    method = build_method("distillm", {})
    assert method.rollouts == {"policy": OnPolicy(0.25), "data": Dataset(0.5), "replay": Replay(0.25, 1000)}
    assert split_prompts(method, 8) == {"policy": 2, "data": 4, "replay": 2}
    assert [(t.on, t.coef) for t in method.terms] == [("policy", 0.25), ("data", 0.5), ("replay", 0.25)]
    only = build_method("distillm", {"on_policy_share": 0.0, "replay_share": 1.0, "capacity": 7})
    assert only.rollouts == {"replay": Replay(1.0, 7)}
    assert list(build_method("distillm", {"on_policy_share": 0.7, "replay_share": 0.3}).rollouts) == [
        "policy",
        "replay",
    ]
    assert method.needs_reward is method.needs_group is method.reads_student("replay") is False


@pytest.mark.parametrize(("arguments", "message"), [
    ({"on_policy_share": 0.8}, "on_policy_share = 0.8 and replay_share = 0.25 must not be negative and add up to at most 1"),
    ({"replay_share": -0.1}, "replay_share = -0.1 must not be negative"),
    ({"replay_share": 0.0, "capacity": 10}, "capacity = 10 has no effect with replay_share = 0"),
    ({"capacity": 0}, r"Replay\(capacity=0\): expected at least 1 rollout"),
    ({"skew": 0.0}, "skew = 0.0 must lie strictly between 0 and 1"),
])  # fmt: skip
def test_arguments_without_effect_or_sense_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=f"method distillm: .*{message}"):
        build_method("distillm", arguments)


def test_three_steps_with_a_buffer(student_path):
    """The first step samples in place of replaying; later ones replay responses of earlier ones, scored as they are now."""
    lm = load_model(ModelConfig(path=student_path), "student")
    method, buffer = build_method("distillm", {"capacity": 6}), ReplayBuffer(6)
    problems = [Problem(str(i), "p", answer="ab") for i in range(4)]
    prompts = [(p, (4, 5 + i)) for i, p in enumerate(problems)]
    supply = Supply(lm, {}, Task("t", problems, []), Sampling(2, 6), Keep(), 0)
    seen: list[tuple[int, ...]] = []
    for step in range(3):
        keys = prompt_keys([ids for _, ids in prompts], step)
        drawn = buffer.draw(2, step)
        requests = {
            "policy": Request(method.rollouts["policy"], prompts[:1], keys[:1]),
            "data": Request(method.rollouts["data"], prompts[1:3], keys[1:3]),
            "replay": Request(method.rollouts["replay"], prompts[3:], keys[3:], drawn),
        }
        found = supply.roll_out(requests, step)
        assert [r.group for name in found for r in found[name]] == [0, 0, 1, 2, 3, 3]
        replayed = [r.response_ids for r in found["replay"]]
        assert step == 0 or (set(replayed) <= set(seen) and all(r.version < step for r in found["replay"]))
        fresh = found["policy"] + ([] if drawn else found["replay"])
        assert {"student", "behaviour"} <= set(flatten(fresh).views)
        if drawn:
            assert flatten(found["replay"]).views == {}  # nothing recorded about an older student
        buffer.add(fresh)
        seen += [r.response_ids for r in fresh]
    assert len(buffer) == 6 and [r.response_ids for r in buffer.kept] == seen[-6:]


def test_logits_of_every_source_get_the_same_divergence():
    """Three sources on one step with shares 1/4, 1/2, 1/4 are one divergence with coefficient 1."""
    p, q, tokens = logits(5, 9, seed=1), logits(5, 9, seed=2), torch.arange(5)
    mixed, alone = build_method("distillm", {}), build_method("full_opd", {"kind": "skew_forward_kl", "mix": 0.1})
    gradients = [logit_gradient(m, p, make_step(m, p, q, tokens))[1] for m in (mixed, alone)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-16
