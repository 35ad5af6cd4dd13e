"""The extrapolation cliff: how far lam > 1 may go at a position that a format decides (arXiv:2605.08737).

A position is reduced to two outcomes, the teacher's modal token and the rest. Teacher, base and student give the modal
token the probabilities p, b and q; c caps the ratio teacher / student. All functions take plain floats (probabilities
strictly between 0 and 1, logits in nats) and none imports torch. They raise RecipeError for values that they are not
defined for.

Left out: training dynamics of whole models. Crossing lambda* puts MORE mass on the modal token; that outputs break
there is the paper's observation and does not follow from the formula. `lambda_flip` is a mechanism that does break them.
"""

from math import exp, inf, log, log1p

from opdkit.errors import RecipeError


def logit(p: float) -> float:
    """log(p / (1 - p)), nats."""
    _probability("p", p)
    return log(p) - log1p(-p)


def sigmoid(x: float) -> float:
    """The inverse of `logit`."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def log_modal(x: float) -> float:
    """log p from logit p."""
    return -log1p(exp(-x)) if x >= 0 else x - log1p(exp(x))


def target(p: float, b: float, lam: float) -> float:
    """p_lambda, the modal mass of p^lam b^(1 - lam) / Z: the optimum of the extrapolated objective (card, c6)."""
    return sigmoid(_target_logit(p, b, lam))


def safe_limit(p: float, c: float) -> float:
    """q_c = 1 - (1 - p) / c: below this modal mass the ratio of the tails, (1 - p) / (1 - q), is under the cap (c7)."""
    _probability("p", p)
    check_cap(c)
    return 1.0 - (1.0 - p) / c


def lambda_star(p: float, b: float, c: float) -> float:
    """The lam at which the target's tail meets the cap: target(p, b, lam) < safe_limit(p, c) iff lam < lambda*.

    1 + log(1 + (c - 1) / p) / (logit p - logit b), Theorem 4.1 in its second form, for 1/2 < p < 1. Infinite where
    b >= p: the teacher is not the surer of the two, extrapolation does not sharpen, and `lambda_flip` applies instead.
    """
    _mode(p)
    check_cap(c)
    return star_of_logits(logit(p), logit(b), c)


def star_of_logits(teacher: float, base: float, c: float) -> float:
    """`lambda_star` from logit p and logit b, which keep the digits of probabilities that round to 1."""
    if base >= teacher:
        return inf
    return 1.0 + log1p((c - 1.0) / sigmoid(teacher)) / (teacher - base)


def lambda_star_as_printed(p: float, b: float, c: float) -> float:
    """Theorem 4.1 in its first form, for comparison; equal to `lambda_star` where b < p."""
    _mode(p)
    check_cap(c)
    if b >= p:
        return inf
    base = log((1.0 - b) / b)
    return (log((1.0 - p) / (c - 1.0 + p)) - base) / (log((1.0 - p) / p) - base)


def lambda_dagger(p: float, b: float, c: float) -> float:
    """Where the fixed point of the loss as stated (weights min(c, teacher / student)) meets the cap (card, c13).

    [c (log c + L0) + w log(q_c / b)] / (w L1 + c L0) with L0 = log((1 - b) / (1 - p)), L1 = log(p / b), w = p / q_c.
    A little above `lambda_star`; infinite where b >= p. Derived for this engine, not in the paper.
    """
    _mode(p)
    check_cap(c)
    return dagger_of_logits(logit(p), logit(b), c)


def dagger_of_logits(teacher: float, base: float, c: float) -> float:
    """`lambda_dagger` from logit p and logit b."""
    if base >= teacher:
        return inf
    rest, modal = log_modal(-base) - log_modal(-teacher), log_modal(teacher) - log_modal(base)
    q = 1.0 - sigmoid(-teacher) / c
    weight = sigmoid(teacher) / q
    return (c * (log(c) + rest) + weight * (log(q) - log_modal(base))) / (weight * modal + c * rest)


def lambda_flip(p: float, b: float) -> float:
    """The lam from which the teacher's modal token is no longer the target's, where the base is surer than the teacher.

    logit b / (logit b - logit p) for b > p > 1/2: extrapolation walks away from the token that both prefer. Infinite
    where b <= p. Two outcomes: exact where the rest has the same proportions under both models.
    """
    _mode(p)
    return flip_of_logits(logit(p), logit(b))


def flip_of_logits(teacher: float, base: float) -> float:
    """`lambda_flip` from logit p > 0 and logit b."""
    return base / (base - teacher) if base > teacher else inf


def entropy_shift(p: float, b: float, c: float, coef: float) -> float:
    """How much an entropy bonus `coef` moves lambda* up: coef x logit(q_c) / (logit p - logit b), for b < p.

    The paper's Eq. 19 has a further factor q_c (1 - q_c), which cancels in an ordinary policy gradient (card, critical
    notes): 1.5e-3 at coef 0.001 where the paper says 2e-7.
    """
    _mode(p)
    if b >= p:
        raise RecipeError(f"b = {b} is not below p = {p}: there is no lambda* to shift; see lambda_flip")
    return coef * logit(safe_limit(p, c)) / (logit(p) - logit(b))


def warmed_up(lam: float, steps: int, warmup: int) -> float:
    """lambda* of a run whose lam warms up over `warmup` of `steps` steps: lam x steps / (steps - warmup), the paper's
    table (its formula is not printed; both values match)."""
    if not 0 <= warmup < steps:
        raise RecipeError(f"warmup = {warmup} of {steps} steps: expected 0 <= warmup < steps")
    return lam * steps / (steps - warmup)


def first_passage_steps(p: float, b: float, c: float, lam: float, lr: float, at_most: int = 1_000_000) -> float:
    """Steps of the expected policy gradient until q passes q_c, from q = b; infinite where it never does.

    On the position's logit: theta += lr q (1 - q) (logit p_lambda - theta) (card, c14), monotone for lr <= 4. Never
    finite at lam <= lambda*: a longer budget moves the crossing left towards lambda*, not below it.
    """
    _rate(lr)
    goal, limit, theta = _target_logit(p, b, lam), logit(safe_limit(p, c)), logit(b)
    if lam <= lambda_star(p, b, c):
        return inf
    for step in range(1, at_most + 1):
        q = sigmoid(theta)
        theta += lr * q * (1.0 - q) * (goal - theta)
        if theta > limit:
            return float(step)
    return inf


def first_passage_linear(p: float, b: float, c: float, lam: float, lr: float) -> float:
    """Corollary 4.2's estimate: log(gap at the start / gap at q_c) / |log(1 - lr lam p (1 - p))| steps.

    A diagnostic: its rate lam p (1 - p) is not the linearisation of the gradient flow, which is q* (1 - q*) at the fixed
    point without lam (card, critical notes). Infinite at lam <= lambda*.
    """
    _rate(lr)
    if lam <= lambda_star(p, b, c):
        return inf
    goal = _target_logit(p, b, lam)
    gaps = log((goal - logit(b)) / (goal - logit(safe_limit(p, c))))
    rate = lr * lam * p * (1.0 - p)
    if rate >= 1:
        raise RecipeError(f"lr x lam x p (1 - p) = {rate:g}: expected below 1; the linearised step overshoots")
    return gaps / -log1p(-rate)


def _target_logit(p: float, b: float, lam: float) -> float:
    return lam * logit(p) + (1.0 - lam) * logit(b)


def check_cap(c: float) -> None:
    """Raise RecipeError unless c can cap a ratio of probabilities."""
    if not 1.0 <= c < inf:
        raise RecipeError(
            f"c = {c}: expected a finite number of at least 1; it caps a ratio that is 1 where teacher and student agree"
        )


def _probability(name: str, p: float) -> None:
    if not 0.0 < p < 1.0:
        raise RecipeError(f"{name} = {p}: expected a probability strictly between 0 and 1")


def _mode(p: float) -> None:
    if not 0.5 < p < 1.0:
        raise RecipeError(
            f"p = {p}: expected more than 1/2 and less than 1; the theorem is about the teacher's sure token"
        )


def _rate(lr: float) -> None:
    if not 0.0 < lr <= 4.0:
        raise RecipeError(f"lr = {lr}: expected above 0 and at most 4; a larger step jumps over the fixed point")
