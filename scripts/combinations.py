"""Objectives x supports x estimators: runs every combination on enumerable distributions and compares its gradient.

Each cell builds a method, takes its mean gradient over every token that the student could sample, through the code that
training runs, and compares it with the gradient of a textbook formula written here. A cell that does not fit its claim
is an error of the script. Left out: the value of a loss, which for policy gradients means nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opdkit.divergences import Kind
from opdkit.losses import (
    ClippedPolicyGradient,
    Divergence,
    Entropy,
    PolicyGradient,
    SampledDivergence,
    SupportPolicyGradient,
)
from opdkit.method import Method, Term, View
from opdkit.pieces import Piece, minus
from opdkit.rows import Loss
from opdkit.signals import expected_log_ratio, log_ratio, outcome, support_gap
from opdkit.step import Layout
from opdkit.support import Full, Sampled, Support, TopK

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

V, K, MIX, ALPHA, CLOSE = 12, 4, 0.3, 0.4, 1e-10
SETS = ("student", "teacher", "union", "intersection", "difference")
COLUMNS = ("sampled: policy gradient", "sampled: differentiated", "top-k tokens as actions", "top-k + rest as one outcome",
           "top-k renormalised", "top-k partial sum", "whole vocabulary")  # fmt: skip
EXACT, OWN, NONE = "exact", "own", "·"
LEGEND = (
    "*exact*: the mean gradient is that of the objective over the whole vocabulary, to 1e-10 in float64. *own*: it is exactly "
    "that of the objective between the narrowed distributions (for each of the five candidate sets), hence biased for "
    "k < vocabulary and exact at k = vocabulary. *as released*: 2604.13016's code, biased as its algebra says. "
    "The policy gradient is the same with PPO's clip at ratio 1 and with vOPD's control variate."
)
Summands = Callable[[Tensor, Tensor], Tensor]


def log_m(p: Tensor, q: Tensor) -> Tensor:
    return (MIX * q.exp() + (1 - MIX) * p.exp()).log()


FORMULAS: dict[Kind, Summands] = {
    "reverse_kl": lambda p, q: p.exp() * (p - q),
    "forward_kl": lambda p, q: q.exp() * (q - p),
    "jsd": lambda p, q: MIX * q.exp() * (q - log_m(p, q)) + (1 - MIX) * p.exp() * (p - log_m(p, q)),
    "skew_forward_kl": lambda p, q: q.exp() * (q - log_m(p, q)),
    "skew_reverse_kl": lambda p, q: p.exp() * (p - log_m(p, q)),
    "total_variation": lambda p, q: (p.exp() - q.exp()).abs() / 2,
    "alpha": lambda p, q: (
        (ALPHA * q.exp() + (1 - ALPHA) * p.exp() - (ALPHA * q + (1 - ALPHA) * p).exp()) / (ALPHA * (1 - ALPHA))
    ),
    "cross_entropy": lambda p, q: -q.exp() * p,
}
SHOWN = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD", "skew_forward_kl": "skewed forward KL",
         "skew_reverse_kl": "skewed reverse KL", "total_variation": "total variation", "alpha": "alpha divergence",
         "cross_entropy": "cross-entropy to the teacher"}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Logits of student and teacher at one prefix [V]."""

    p: Tensor
    q: Tensor

    def gradient(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient of a function of both sides' log-probs with respect to the student's logits."""
        leaf = self.p.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(value(leaf.log_softmax(-1), self.q.log_softmax(-1)), leaf)
        return found

    def ids(self, of: str) -> Tensor:
        """The candidate set by definition, sorted."""
        student, teacher = (set(x.topk(K).indices.tolist()) for x in (self.p, self.q))
        sets = {"student": student, "teacher": teacher, "union": student | teacher, "intersection": student & teacher,
                "difference": student ^ teacher}  # fmt: skip
        return torch.tensor(sorted(sets[of]), dtype=torch.long)


def method(loss: Loss, support: Support | None, signal: Piece | None = None, coef: float = 1.0) -> Method:
    views = {} if support is None else {"teacher": View("teacher", support)}
    return Method(name="cell", views=views, terms=(Term(loss=loss, signal=signal, coef=coef),))


def found(pair: Pair, made: Method) -> Tensor:
    from synthetic import expected_gradient

    return expected_gradient(made, pair.p, pair.q)


def same(name: str, a: Tensor, b: Tensor) -> None:
    """Stop unless two gradients agree."""
    gap = (a - b).abs().max().item()
    if not gap < CLOSE:
        sys.exit(f"{name}: the gradient is {gap:.1e} away from the formula's")


def on_list(formula: Summands, ids: Tensor, how: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The formula on a candidate set, with the rest as one outcome, renormalised, or left out."""

    def narrowed(x: Tensor) -> Tensor:
        kept = x[ids]
        if how == "bucket":
            rest = torch.ones(V, dtype=torch.bool)
            rest[ids] = False
            return torch.cat([kept, x[rest].logsumexp(0, keepdim=True)])
        return kept.log_softmax(-1) if how == "renormalise" else kept

    return lambda p, q: formula(narrowed(p), narrowed(q)).sum()


def divergence_row(pair: Pair, kind: Kind) -> list[str]:
    formula = FORMULAS[kind]
    given = (
        {"mix": MIX}
        if kind in ("jsd", "skew_forward_kl", "skew_reverse_kl")
        else {"alpha": ALPHA}
        if kind == "alpha"
        else {}
    )
    whole = pair.gradient(lambda p, q: formula(p, q).sum())
    same(f"{kind}, whole vocabulary", found(pair, method(Divergence(kind, **given), Full())), whole)
    cells = []
    for how in ("bucket", "renormalise", "raw"):
        loss = Divergence(kind, tail=how, **given)
        for of in SETS:
            wanted = pair.gradient(on_list(formula, pair.ids(of), how))
            same(f"{kind}, top-k of {of}, {how}", found(pair, method(loss, TopK(K, of))), wanted)
        same(f"{kind}, top-V, {how}", found(pair, method(loss, TopK(V))), whole)
        cells.append(OWN)
    sampled = {"reverse_kl": ("k2", 1.0), "forward_kl": ("k3", 1.0), "total_variation": ("abs", 0.5)}
    differentiated = NONE
    if kind in sampled:
        estimator, coef = sampled[kind]
        loss = SampledDivergence(estimator, teacher="teacher")
        same(f"{kind}, {estimator}", found(pair, method(loss, Sampled(), coef=coef)), whole)
        differentiated = f"{EXACT} ({estimator}{'' if coef == 1 else f', x {coef}'})"
    if kind == "cross_entropy":  # the same gradient as the forward KL
        same("cross_entropy, k3", found(pair, method(SampledDivergence("k3", teacher="teacher"), Sampled())), whole)
        differentiated = f"{EXACT} (k3)"
    rewarded, actions = policy_gradients(pair, whole) if kind == "reverse_kl" else (NONE, NONE)
    return [SHOWN[kind], rewarded, differentiated, actions, *cells, EXACT]


def policy_gradients(pair: Pair, whole: Tensor) -> tuple[str, str]:
    """The reverse KL as a reward: plain, clipped, with the control variate, and with every candidate as an action."""
    for loss in (PolicyGradient(), ClippedPolicyGradient(), ClippedPolicyGradient(None, None, None)):
        same(f"{loss}", found(pair, method(loss, Sampled(), log_ratio())), whole)
        for support in (Full(), TopK(K)):
            varied = minus(log_ratio(), expected_log_ratio())
            same(f"{loss}, control variate, {support}", found(pair, method(loss, support, varied)), whole)
    loss, signal = SupportPolicyGradient(), support_gap()
    for of in SETS[:1]:
        same(f"top-k of {of} as actions", found(pair, method(loss, TopK(K, of), signal)), as_actions(pair, of))
    same("top-V as actions", found(pair, method(loss, TopK(V), signal)), whole)
    return EXACT, "as released"


def as_actions(pair: Pair, of: str) -> Tensor:
    """- sum over the list of p'_k (log q_k - log p_k) grad log p_k, p' renormalised and detached (2604.13016's code)."""
    ids = pair.ids(of)
    p, q = pair.p.log_softmax(-1)[ids], pair.q.log_softmax(-1)[ids]
    weight = p.softmax(-1) * (q - p)
    return pair.gradient(lambda x, _: -(weight * x[ids]).sum())


def entropy_row(pair: Pair) -> list[str]:
    same("entropy", found(pair, method(Entropy(), None)), pair.gradient(lambda p, q: (p.exp() * p).sum()))
    return ["entropy bonus", *[NONE] * 6, EXACT]


def reward_row(pair: Pair) -> list[str]:
    """Two prompts with three responses of one token each: -1/N sum A (onehot - p), the advantages written out."""
    from synthetic import logit_gradient, make_step

    tokens, reward = torch.tensor([0, 3, 5, 1, 1, 7]), torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    layout = Layout(torch.arange(6), torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 1]))
    rows = pair.p.expand(6, V).contiguous()
    groups = reward.view(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    advantages = {(False, "group_mean"): centred, (True, "group_mean"): centred / (groups.std(1, keepdim=True) + 1e-6),
                  (False, "leave_one_out"): centred * 3 / 2}  # fmt: skip
    for (std, baseline), advantage in advantages.items():
        for loss in (PolicyGradient(), ClippedPolicyGradient()):
            made = method(loss, None, outcome(std=std, baseline=baseline))
            step = make_step(made, rows, rows, tokens, layout=layout, reward=reward)
            wanted = -advantage.reshape(6, 1) * (torch.eye(V, dtype=torch.float64)[tokens] - rows.softmax(-1)) / 6
            same(f"outcome, std {std}, {baseline}", logit_gradient(made, rows, step)[1], wanted)
    return ["outcome reward (GRPO, RLOO)", EXACT, *[NONE] * 6]


def table() -> str:
    """The table as Markdown. Ends the program when a combination does not do what its cell says."""
    from synthetic import logits

    pair = Pair(logits(V, seed=1), logits(V, seed=1) + 0.5 * logits(V, seed=2))
    rows = [divergence_row(pair, kind) for kind in FORMULAS] + [reward_row(pair), entropy_row(pair)]
    lines = ["| objective | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


if __name__ == "__main__":
    print(table())
