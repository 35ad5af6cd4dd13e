"""`opd cliff`: measure teacher and reference at structural positions, and say how far a recipe's lam may go."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Literal

from opdkit.config import MethodConfig, Recipe
from opdkit.diagnostics.structure import QUANTILES, Bound, Cliff, measure, sigmoid, summarise
from opdkit.errors import RecipeError
from opdkit.method import Method
from opdkit.pieces import Piece
from opdkit.train.setup import set_up


def cliff(
    recipe: Recipe, *, tau: float = 0.9, cap: float | None = None, prompts: int = 200,
    on: Literal["teacher", "student"] = "teacher", as_json: bool = False,
) -> str:  # fmt: skip
    """The result as text or JSON. Raises RecipeError for a recipe without teacher and reference or without a cap.

    A recipe that takes its lam from an earlier result (`method.cliff`) is measured without it.
    """
    arguments = {key: value for key, value in recipe.method.arguments.items() if key != "cliff"}
    recipe = recipe.model_copy(update={"method": MethodConfig(name=recipe.method.name, **arguments)})
    setup = set_up(recipe)
    names = {view: _model(setup.method, view) for view in ("teacher", "reference")}
    limit = cap if cap is not None else _importance_cap(setup.method)
    measured = measure(setup, **names, prompts=prompts, on=on)
    found = summarise(measured, cap=limit, tau=tau)
    paths = {view: setup.teachers[name].path for view, name in names.items()}
    if as_json:
        return json.dumps({"task": setup.task.name, "on": on, **paths, **found.to_dict()}, indent=2)
    head = f"task {setup.task.name}, {found.responses} held-out prompts, greedy responses of the {on}"
    return "\n".join([head, *(f"{view}: {path}" for view, path in paths.items()),
                      *describe(found, setup.student.tokenizer.decode)])  # fmt: skip


def _model(method: Method, view: str) -> str:
    """The teacher of the recipe behind a view."""
    if view not in method.views:
        raise RecipeError(f"method {method.name} with these arguments has no view '{view}', so it extrapolates nothing; take "
                          "a method with a teacher and a reference, and a lam other than 1")  # fmt: skip
    if method.views[view].context != "own":
        raise RecipeError(f"view '{view}' of method {method.name} reads a context of its own; the cliff is measured on "
                          "the prompts that the student reads")  # fmt: skip
    model = method.views[view].model
    if not isinstance(model, str):
        raise RecipeError(f"view '{view}' of method {method.name} has a teacher for each domain; measure them one by one, "
                          "each with a recipe of its own")  # fmt: skip
    return model


def _importance_cap(method: Method) -> float:
    """The cap of the method's importance weights."""

    def caps(piece: Piece) -> list[float]:
        own = [value for key, value in piece.args if key == "cap" and value is not None]
        return own + [cap for child in piece.children for cap in caps(child)]

    found = [cap for term in method.terms for cap in caps(term.weight)]
    if not found:
        raise RecipeError(f"method {method.name} has no importance weight with a cap, and lambda* depends on it; give --cap, "
                          "such as --cap 5")  # fmt: skip
    return min(found)


def describe(found: Cliff, decode: Callable[[list[int]], str]) -> list[str]:
    """The lines that `opd cliff` prints about a measurement."""
    share = found.structural / found.positions
    lines = [
        f"structural positions (teacher's top probability at least {found.tau}): {found.structural} of "
        f"{found.positions} ({share:.0%}); cap c = {found.cap:g}",
        "",
        "             1 - p teacher   1 - b reference   lambda*   lambda_dagger",
        _row("typical", found.typ),
        _row("safe", found.safe),
        "",
    ]
    surer, below = found.surer / found.structural, found.surer_below / found.positions
    if found.surer or found.surer_below:
        flips = ", ".join(f"{share:.0%} of the responses {_number(found.flip(share))}" for share in QUANTILES)
        tokens = ", ".join(f"{decode([token])!r} {count}" for token, count in found.tokens)
        lines += [
            f"warning: the reference is surer than the teacher of the teacher's own token at {surer:.1%} of the structural "
            f"positions, and at {below:.1%} of all positions below tau, which lambda* does not see.",
            "There lam > 1 walks away from that token, and the greedy choice changes from lambda_flip on:",
            f"  {flips}",
            f"  tokens that change first: {tokens}",
            f"  responses with such a token at the recommended lam: {found.flipped(found.recommended):.1%}",
            "",
        ]
    what, where = found.bound
    return [*lines, f"recommended: method.lam={found.recommended:g}   (bound: {what}, {_number(where)})"]


def _row(name: str, bound: Bound) -> str:
    rest, base = f"{sigmoid(-bound.teacher):.2e}", f"{sigmoid(-bound.base):.2e}"
    return f"{name:<10}   {rest:<13}   {base:<15}   {_number(bound.star):<7}   {_number(bound.dagger)}"


def _number(x: float) -> str:
    return f"{x:.3f}" if isfinite(x) else "none"
