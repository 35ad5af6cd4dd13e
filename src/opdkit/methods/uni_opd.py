"""On-policy distillation from one teacher a domain, with balanced outcomes and calibrated margins (arXiv:2605.03677).

    r_t = log q(y_t) - log p(y_t),   q = the teacher of the prompt's domain,   G = mean_t r_t over a response
    A_t = r_t + shift(G, outcome):  where the correct responses to a prompt do not lie least_margin above the incorrect ones
    L = - mean_responses mean_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t),   |r_t| < log_ratio_limit

`teacher` is a name, or {domain: name}. margin: "shift" moves the rewards of whole responses (`margin_shift`), "mask" leaves
the worst offenders out (`margin_mask`), "none" is `opd` with a mean per response, and so is "shift" where all margins hold.
The shift is a policy gradient on the outcome, for prompts that violate their margin only; a large margin drowns the rest.
balance = correct rollouts for each incorrect one that are trained on (`Balance`); None = all. Defaults: the main
experiments' (least_margin, direction both, mean) and the released scripts' (clip, range, keep).
Left out: offline balancing (a setting of the task, task.upsample), and mixing teachers at one token. What the released code
does otherwise is said in `margins` and `rollouts.balance`.
"""

from typing import Literal

from opdkit.losses import ClippedPolicyGradient
from opdkit.margins import Direction, Mode, Scope, below_margin, margin_mask, margin_shift, within_log_ratio
from opdkit.method import Method, Term, View
from opdkit.pieces import times
from opdkit.rollouts.balance import Balance
from opdkit.signals import log_ratio
from opdkit.weights import ones


def uni_opd(
    *,
    teacher: str | dict[str, str] = "teacher",
    margin: Literal["shift", "mask", "none"] = "shift",
    least_margin: float = 0.4,
    direction: Direction = "both",
    mode: Mode = "mean",
    scope: Scope = "group",
    keep: float = 0.25,
    balance: float | None = 1.0,
    log_ratio_limit: float | None = 10.0,
    low: float | None = 0.2,
    high: float | None = 0.28,
    dual: float | None = None,
) -> Method:
    changed = {"direction": direction != "both", "keep": keep != 0.25,
               "least_margin, mode and scope": (least_margin, mode, scope) != (0.4, "mean", "group")}  # fmt: skip
    unused = {"shift": ["keep"], "mask": ["direction"], "none": list(changed)}[margin]
    if wrong := [name for name in unused if changed[name]]:
        raise ValueError(f"{wrong[0]} has no effect with margin = {margin!r}; remove it")
    signal, weight = log_ratio(), ones() if log_ratio_limit is None else within_log_ratio(limit=log_ratio_limit)
    closer = below_margin(of=signal, delta=least_margin, mode=mode, scope=scope)
    watch = {"margin/below": closer, "margin/inverted": below_margin(of=signal, scope=scope)}
    if margin == "mask":
        weight = times(weight, margin_mask(of=signal, delta=least_margin, keep=keep, mode=mode, scope=scope))
    elif margin == "shift":
        signal = margin_shift(of=signal, delta=least_margin, direction=direction, mode=mode, scope=scope)
    term = Term(
        loss=ClippedPolicyGradient(low, high, dual), signal=signal, weight=weight, reduction="seq_mean_token_mean"
    )
    prepare = () if balance is None else (Balance(balance),)
    return Method(name="uni_opd", prepare=prepare, views={"teacher": View(teacher)}, terms=(term,), watch=watch)
