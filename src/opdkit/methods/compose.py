"""A method that the recipe spells out: parts by name, or a published method with parts changed.

    method: {name: compose, views: {teacher: "View('teacher', TopK(20))"}, terms: ["Term(signal=log_ratio())"]}
    method: {name: compose, base: {name: vopd, k: 20}, weight: "turn_weight()", add: ["Term(signal=outcome())"]}

Every part is written as it prints (`opd explain NAME`), with + - * between signals, weights and numbers
(`opdkit.expressions`). With `terms` the method is what is written. Without, it starts from `base`, a method of the catalogue
with its arguments; `weight` multiplies the weights of its terms, `add` gives it more terms, and the other arguments add
to its parts: a view, a rollout source or a watched piece of the same name is replaced.
Default: base {name: opd}. Left out: taking a part out of `base`; write the terms instead.
"""

from dataclasses import replace
from typing import Any

from opdkit.catalogue import build_method
from opdkit.errors import MethodError
from opdkit.expressions import read, read_parts
from opdkit.method import Method
from opdkit.pieces import times
from opdkit.weights import ones


def compose(
    *,
    base: dict[str, Any] | None = None,
    weight: str | None = None,
    add: list[str] | None = None,
    terms: list[str] | None = None,
    views: dict[str, str] | None = None,
    rollouts: dict[str, str] | None = None,
    prepare: list[str] | None = None,
    controllers: list[str] | None = None,
    after_update: list[str] | None = None,
    watch: dict[str, str] | None = None,
) -> Method:
    if terms is not None and (base, weight, add) != (None, None, None):
        raise MethodError("method compose: base, weight and add start from a method, and terms spells out a whole one; "
                          "give either terms or the others")  # fmt: skip
    parts = read_parts(add=add, terms=terms, views=views, rollouts=rollouts, prepare=prepare, controllers=controllers,
                       after_update=after_update, watch=watch)  # fmt: skip
    if terms is not None:
        return Method(name="compose", **{"views": {}, **parts})
    arguments = {"name": "opd"} if base is None else dict(base)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise MethodError(f"method compose: base = {base} has no name; write something like {{name: vopd, k: 20}}")
    start = build_method(name, arguments)
    kept = list(start.terms)
    if weight is not None:
        factor = read(weight, "piece", "method compose: weight")
        kept = [replace(t, weight=factor if t.weight == ones() else times(t.weight, factor)) for t in kept]
    more: dict[str, Any] = {"terms": (*kept, *parts.pop("add", ()))}
    for field, found in parts.items():
        old = getattr(start, field)
        more[field] = {**old, **found} if isinstance(found, dict) else (*old, *found)
    return replace(start, name="compose", **more)
