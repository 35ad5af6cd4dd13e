"""ListOPD: the teacher extrapolated over the warm start, with lam one step below its measured cliff (arXiv:2605.08737).

    A_t = lam log q - log p - (lam - 1) log b,     L = - mean_t w_t min(r_t A_t, clip(r_t) A_t)
    ratio="sampler":  w_t = min(p / p_sampler, cap)     the trainer's setting in the paper's runs
    ratio="teacher":  w_t = min(q / p, cap)             the loss as the paper states it (Eq. 3); its optimum is another one

`opd cliff RECIPE --json > FILE` measures how sure teacher q and reference b are where the format decides; `cliff: FILE`
takes lam from it. b is the supervised warm start that the student also starts from ({path: student:base}).
Critical notes: lam* bounds the mass ON the format's tokens, and no step from there to broken outputs is shown; the
paper's cliffs lie at or below it, and move left with longer runs. Where b > q they break in another way: docs/extrapolation.
Defaults: lam 1.15 (its deployed one), cap 5, clip 0.2, dual 3: its runs. At lam = 1 the reference is scored and cancels.
Left out: the sweep of lam at the real budget, and its control without a reference.
"""

import json
from pathlib import Path
from typing import Literal

from opdkit.losses import ClippedPolicyGradient
from opdkit.method import Method, Term, View
from opdkit.pieces import plus, scale
from opdkit.signals import log_ratio
from opdkit.weights import importance


def listopd(
    *,
    teacher: str = "teacher",
    reference: str = "reference",
    lam: float | None = None,
    cliff: str | None = None,
    ratio: Literal["sampler", "teacher"] = "sampler",
    cap: float = 5.0,
    low: float | None = 0.2,
    high: float | None = 0.2,
    dual: float | None = 3.0,
) -> Method:
    if lam is not None and cliff is not None:
        raise ValueError(f"lam = {lam} and cliff = {cliff!r} both set lam; give one of them")
    lam = _recommended(cliff) if cliff is not None else 1.15 if lam is None else lam
    if lam < 0:
        raise ValueError(f"lam = {lam}: expected at least 0; 0 = the reference, 1 = the teacher")
    signal = plus(log_ratio(), scale(lam - 1, log_ratio(den="reference")))
    num, den = ("student", "behaviour") if ratio == "sampler" else ("teacher", "student")
    term = Term(
        loss=ClippedPolicyGradient(low, high, dual), signal=signal, weight=importance(num=num, den=den, cap=cap)
    )
    return Method(name="listopd", views={"teacher": View(teacher), "reference": View(reference)}, terms=(term,))


def _recommended(path: str) -> float:
    """lam in a file that `opd cliff --json` wrote. Raises ValueError for any other file."""
    try:
        text = Path(path).read_text()
        return float(json.loads(text, parse_constant=int)["recommended"])  # int refuses NaN and Infinity
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cliff = {path!r} holds no recommendation ({error}); write it with "
                          "opd cliff RECIPE --json > FILE, or give lam") from error  # fmt: skip
