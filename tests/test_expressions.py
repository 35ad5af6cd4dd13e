"""Parts of a method from text: what prints reads back, operators, wrong texts, and methods that a recipe spells out."""

import json
import re
from dataclasses import replace
from math import inf, log
from pathlib import Path

import pytest
import torch
from synthetic import logit_gradient, logits, make_step
from test_invariants import TABLE
from test_loop import metrics, run, same, weights

from opdkit import expressions
from opdkit.catalogue import build_method
from opdkit.config import load_recipe, recipe_path
from opdkit.drift import low_overlap, reliable
from opdkit.errors import MethodError, RecipeError
from opdkit.expressions import fits, part_names, read
from opdkit.extrapolate import EffOPD
from opdkit.gate import EntropyGate
from opdkit.losses import ClippedPolicyGradient, PolicyGradient
from opdkit.method import Linear, Method, Term, View
from opdkit.pieces import Piece, minus, plus, scale, times
from opdkit.rollouts.balance import Balance
from opdkit.signals import expected_log_ratio, log_ratio, outcome, support_gap
from opdkit.sources import OnPolicy
from opdkit.step import Layout
from opdkit.support import Full, TopK
from opdkit.turns import turn_weight
from opdkit.weights import confidence, ones

SOURCE = Path(expressions.__file__).parent
A, B = log_ratio(), confidence()


def piece(text: str) -> Piece:
    return read(text, "piece", "here")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def spelt_out(method: Method) -> dict:
    """The arguments of `compose` that are a method's parts as they print."""
    listed = {"prepare": method.prepare, "terms": method.terms, "controllers": method.controllers,
              "after_update": method.after_update}  # fmt: skip
    named = {"rollouts": method.rollouts, "views": method.views, "watch": method.watch}
    found = {key: [repr(part) for part in parts] for key, parts in listed.items()}
    return found | {key: {name: repr(part) for name, part in parts.items()} for key, parts in named.items()}


@pytest.mark.parametrize("c", TABLE, ids=str)
def test_every_method_reads_back_from_what_it_prints(c):
    method = c.build()
    again = build_method("compose", spelt_out(method))
    assert again == replace(method, name="compose") and str(again) == str(replace(method, name="compose"))
    assert Method.from_dict(json.loads(json.dumps(again.to_dict()))) == again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("log_ratio()", A),
        ("log_ratio(num='reference')", log_ratio(num="reference")),
        ("log_ratio() + confidence()", plus(A, B)),
        ("log_ratio() - confidence()", minus(A, B)),
        ("log_ratio() * confidence()", times(A, B)),
        ("-log_ratio()", scale(-1.0, A)),
        ("0.5 * log_ratio()", scale(0.5, A)),
        ("log_ratio() * 2", scale(2.0, A)),
        ("-0.5 * log_ratio()", scale(-0.5, A)),
        ("1 - confidence()", minus(ones(), B)),
        ("confidence() + 0.5", plus(B, scale(0.5, ones()))),
        (
            "outcome() + 0.5 * (log_ratio() - expected_log_ratio())",
            plus(outcome(), scale(0.5, minus(A, expected_log_ratio()))),
        ),
        ("2 * 3 * log_ratio() + (1 - 4) * confidence()", plus(scale(6.0, A), scale(-3.0, B))),
        ("plus(log_ratio(), confidence(), ones())", plus(A, B, ones())),
        ("minus(log_ratio(), confidence())", minus(A, B)),
        ("scale(factor=2, part=log_ratio())", scale(2.0, A)),
        ("0.25", scale(0.25, ones())),
        ("1", ones()),
        ("  log_ratio(\n  num='teacher',\n)\n", A),
    ],
)
def test_operators_and_calls(text, expected):
    assert piece(text) == expected


def test_the_text_of_the_task():
    text = """Term(loss=ClippedPolicyGradient(low=0.2, high=0.28, dual=3), weight=turn_weight(cap=None), coef=Linear(0, 1),
              signal=outcome() + 0.5 * (log_ratio() - expected_log_ratio()), reduction='seq_mean_token_mean')"""
    signal = plus(outcome(), scale(0.5, minus(A, expected_log_ratio())))
    assert read(text, "term", "here") == Term(
        loss=ClippedPolicyGradient(0.2, 0.28, 3.0), signal=signal, weight=turn_weight(cap=None), coef=Linear(0.0, 1.0),
        reduction="seq_mean_token_mean",
    )  # fmt: skip


def test_every_kind_of_part():
    assert read("View({'sums': 'a', '*': 'b'}, TopK(8, of='union'))", "view", "x") == View(
        {"sums": "a", "*": "b"}, TopK(8, "union")
    )
    shown = read("View('t', context=Shown(texts=[Sibling(), Solution('answer')], assess=True))", "view", "x")
    assert shown == read(repr(shown), "view", "x") and len(shown.context.texts) == 2
    assert read("OnPolicy(share=0.5)", "source", "x") == OnPolicy(0.5)
    assert read("Balance(ratio=inf)", "prepare step", "x") == Balance(inf)
    assert read("EntropyGate(warmup=3)", "controller", "x") == EntropyGate(warmup=3)
    assert read("EffOPD(tries=2)", "hook", "x") == EffOPD(tries=2)


def test_operators_give_the_numbers_that_they_say():
    layout = Layout(torch.zeros(4).long(), torch.arange(4), torch.zeros(4).long())
    method = build_method("opd", {})
    step = make_step(method, logits(4, 9, seed=1), logits(4, 9, seed=2), torch.arange(4), layout=layout)
    a, b = A(step), B(step)
    assert torch.equal(
        piece("2 * log_ratio() * confidence() - (1 - confidence())")(step), 2 * a * b + -1.0 * (1 + -1.0 * b)
    )


def test_all_modules_with_parts_are_known():
    """What registers a part is imported by a published method, so that a text can name it."""
    part_names()
    import sys

    makes = [p for p in SOURCE.rglob("*.py") if re.search(r"^(@piece\(|register\()", p.read_text(), re.M)]
    names = {".".join(("opdkit", *p.relative_to(SOURCE).with_suffix("").parts)) for p in makes}
    assert names and names <= sys.modules.keys()
    assert {"Term", "View", "log_ratio", "plus", "Full", "EffOPD", "Shown"} <= part_names().keys()
    assert not {"Method", "_plus", "pipe"} & part_names().keys()


# ---------------------------------------------------------------------------------------------------------------------
# Wrong texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "log_ration()",
            r"here, character 1 \(log_ration\(\)\): unknown name 'log_ration': did you mean 'log_ratio'\?",
        ),
        ("2 * log_ration()", "character 5"),
        ("('é' * log_ration())", "character 8"),
        ("  \n log_ration()", "character 5"),
        ("log_ratio(nun='a')", "character 11 .* log_ratio has no argument 'nun': did you mean 'num'"),
        ("log_ratio", r"'log_ratio' is not called; write log_ratio\(\)"),
        ("log_ratio()()", "this is not allowed"),
        ("log_ratio('teacher', 'student', 'third')", "too many positional arguments"),
        ("scale(2.0)", "missing a required argument: 'part'"),
        ("log_ratio().__class__", "this is not allowed; allowed are calls"),
        ("__import__('os').system('true')", "this is not allowed"),
        ("__import__('os')", "unknown name '__import__'"),
        ("(lambda: 1)()", "this is not allowed"),
        ("[a for a in (1,)]", "this is not allowed"),
        ("f'{1}'", "this is not allowed"),
        ("log_ratio()[0]", "this is not allowed"),
        ("log_ratio() / 2", "this is not allowed"),
        ("log_ratio() ** 2", "this is not allowed"),
        ("log_ratio() if True else ones()", "this is not allowed"),
        ("{**{}}", "this is not allowed"),
        ("plus(*(1, 2))", "this is not allowed"),
        ("log_ratio(**{})", r"log_ratio\(\*\*\.\.\.\) is not allowed"),
        ("b'x'", "this is not allowed"),
        ("log_ratio() + 'a'", "between pieces and numbers, not 'a'"),
        ("True * log_ratio()", "between pieces and numbers, not True"),
        ("-'a'", "between pieces and numbers, not 'a'"),
        ("support_gap() + log_ratio()", "cannot add signals of different shapes"),
        ("support_gap() + 1", "cannot add signals of different shapes"),
        ("discounted(of=3, gamma=0.5)", "discounted: of = 3: expected opdkit.pieces.Piece"),
        ("discounted(of=log_ratio(), gamma='a')", "gamma = 'a': expected float"),
        ("discounted(of=log_ratio(), gamma=True)", "gamma = True: expected float"),
        ("turn_weight(form='sum')", "form = 'sum': expected"),
        ("turn_weight(cap=0.5)", "expected at least 1, the weight of the first turn"),
        ("importance(num='a', den='a')", "the ratio of a policy to itself is 1"),
        ("log_ratio() 3", "character 13 .*invalid syntax"),
        ("log_ratio(", "never closed"),
        ("", "character 1 .the end.: invalid syntax"),
        ("PolicyGradient()", "is not a piece; write something like"),
        ("'log_ratio()'", "is not a piece"),
        ("-" * 50_000 + "1", "here"),
        ("(" * 5_000 + "1", "too many nested parentheses"),
        ("1" * 5_000, "digits"),
        ("log_ratio(num='a', num='b')", "log_ratio is given 'num' twice"),
        ("\0", "here"),
        ("log_ratio() * 1" + "0" * 400, "int too large to convert to float"),
    ],
)
def test_a_wrong_text_says_where_and_what(text, message):
    with pytest.raises(MethodError, match=message) as raised:
        piece(text)
    assert str(raised.value).startswith("here") and len(str(raised.value)) < 3000


@pytest.mark.parametrize(
    ("text", "what", "message"),
    [
        ("Term(loss=3, signal=log_ratio())", "term", "Term: loss = 3: expected opdkit.rows.Loss"),
        ("Term(signal=log_ratio(), reduction='mean')", "term", "reduction = 'mean': expected"),
        ("Term(signal=log_ratio(), weights=ones())", "term", "no argument 'weights': did you mean 'weight'"),
        ("TopK(0)", "view", "k must be at least 1"),
        ("TopK('8')", "view", "k = '8': expected int"),
        ("TopK(8)", "view", r"'TopK\(8\)' is not a view; write something like View\('teacher'\)"),
        ("log_ratio()", "prepare step", "is not a prepare step"),
        ("log_ratio()", "controller", "is not a controller"),
        ("EffOPD(tries=-1)", "hook", "at least 0 tries"),
        ("Balance(scope='prompt')", "prepare step", "scope = 'prompt': expected"),
        ("View('teacher', context='mine')", "view", "context = 'mine': expected"),
        ("View({'sums': 3})", "view", "model = "),
    ],
)
def test_a_part_of_the_wrong_kind(text, what, message):
    with pytest.raises(MethodError, match=message):
        read(text, what, "here")


def test_values_fit_their_annotations():
    assert not fits(1, float) and fits(1, int | None) and fits(None, int | None) and fits((1, 2), tuple[int, ...])
    assert fits((1, "a"), tuple[int, str]) and not fits((1,), tuple[int, str]) and not fits((1, "a"), tuple[int, ...])
    assert (
        not fits(True, int) and not fits(True, float) and fits(True, bool) and not fits(1, bool) and not fits(1.0, int)
    )
    assert not fits(A, float) and fits(A, Piece | None) and fits({"a": 1.0}, dict[str, float])
    assert not fits({"a": "b"}, dict[str, float])


# ---------------------------------------------------------------------------------------------------------------------
# The method


def test_vopd_with_turn_weights_and_an_outcome_is_what_python_makes():
    clip = ClippedPolicyGradient(0.2, 0.28, 3.0)
    made = build_method("compose", {
        "base": {"name": "vopd", "k": 20, "low": 0.2, "high": 0.28, "dual": 3.0}, "weight": "turn_weight()",
        "add": ["Term(loss=ClippedPolicyGradient(0.2, 0.28, 3.0), signal=outcome())"],
    })  # fmt: skip
    assert made == Method(
        name="compose",
        views={"teacher": View("teacher", TopK(20))},
        terms=(
            Term(loss=clip, signal=minus(A, expected_log_ratio()), weight=turn_weight()),
            Term(loss=clip, signal=outcome()),
        ),
    )


def test_a_base_keeps_its_parts_and_gets_more():
    base = build_method("prune_opd", {})
    made = build_method("compose", {
        "base": {"name": "prune_opd"}, "weight": "2 * confidence()", "controllers": ["EntropyGate()"],
        "views": {"teacher": "View('teacher', TopK(32))"}, "watch": {"sure": "confidence()"}, "prepare": ["Balance()"],
        "after_update": ["EffOPD()"], "rollouts": {"policy": "OnPolicy()"},
    })  # fmt: skip
    assert made.terms == (replace(base.terms[0], weight=scale(2.0, B)),)
    assert made.controllers == (*base.controllers, EntropyGate()) and made.after_update == (EffOPD(),)
    assert made.views == {"teacher": View("teacher", TopK(32))} and made.prepare == (Balance(),)
    assert made.watch == {**base.watch, "sure": B} and made.rollouts == {"policy": OnPolicy()}
    twice = build_method("compose", {"base": {"name": "uni_opd"}, "weight": "confidence()"})
    assert twice.terms[0].weight == times(build_method("uni_opd", {}).terms[0].weight, B)


def test_one_text_says_the_same_as_one_method(recipe_data):
    p, q = logits(12, 50, seed=3), logits(12, 50, seed=4)
    whole = build_method("compose", {"views": {"teacher": "View('teacher', Full())"},
                                     "terms": ["Term(signal=log_ratio() - expected_log_ratio())"]})  # fmt: skip
    vopd = build_method("vopd", {})
    step = make_step(vopd, p, q, torch.arange(12))
    assert torch.equal(logit_gradient(whole, p, step)[1], logit_gradient(vopd, p, step)[1])
    assert whole == replace(vopd, name="compose") and whole.views["teacher"].support == Full()
    assert whole.terms[0].loss == PolicyGradient() and support_gap().rank == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": {"k": 20}}, "has no name"),
        ({"base": {"name": "vodp"}}, "unknown method 'vodp': did you mean 'vopd'"),
        ({"base": {"name": "vopd", "kk": 2}}, "method vopd has no argument 'kk'"),
        ({"base": {"name": "vopd", "k": "many"}}, "k='many': expected int"),
        ({"terms": ["Term(signal=log_ratio())"], "weight": "ones()"}, "give either terms or the others"),
        ({"terms": ["Term(signal=log_ratio())"], "base": {"name": "opd"}}, "give either terms or the others"),
        ({"terms": []}, "has no terms"),
        ({"terms": ["Term(signal=log_ratio())"]}, "reads view 'teacher', but the views are none"),
        ({"terms": "Term(signal=log_ratio())"}, "expected list"),
        ({"add": ["Term(signal=log_ratio())", "Term(signal=log_ration())"]}, r"compose: add\[1\], character 13"),
        ({"weight": "support_gap()"}, r"weight .* is \[N, K\]"),
        ({"weight": "1 +"}, "method compose: weight, character"),
        ({"weight": 0.5}, "weight=0.5: expected str"),
        ({"watch": {"x": "y()"}}, r"method compose: watch\.x, character 1"),
        ({"view": {}}, "has no argument 'view': did you mean 'views'"),
    ],
)
def test_wrong_recipes(arguments, message):
    with pytest.raises((MethodError, RecipeError), match=message):
        build_method("compose", arguments)


RECIPES = ("vopd_sod_grpo", "prune_antisd", "uni_prune", "effopd")


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_build(name):
    recipe = load_recipe(f"cpu/{name}")
    method = build_method(recipe.method.name, recipe.method.arguments)
    assert set(method.models) == set(recipe.teachers) and recipe_path(f"cpu/{name}").read_text().startswith("# ")
    assert method == Method.from_dict(json.loads(json.dumps(method.to_dict())))


def of_recipe(name: str) -> Method:
    recipe = load_recipe(f"cpu/{name}")
    return build_method(recipe.method.name, recipe.method.arguments)


def two_sequences(method: Method, **fields):
    """Two responses of six tokens to one prompt, and per token: log q - log p, and whether 4 x `below` ids are common."""
    p, q = logits(12, 20, seed=5), logits(12, 20, seed=5) + logits(12, 20, seed=6)
    tokens, seq = torch.arange(12), torch.arange(12) // 6
    layout = Layout(seq, seq, torch.zeros(2, dtype=torch.long))
    step = make_step(method, p, q, tokens, layout=layout, **fields)
    u = (q.log_softmax(-1) - p.log_softmax(-1))[tokens, tokens]
    return (
        step,
        u,
        [len(set(a.topk(4).indices.tolist()) & set(b.topk(4).indices.tolist())) for a, b in zip(p, q, strict=True)],
    )


def faded(common: list[int], least: int, drop: float, base: float) -> torch.Tensor:
    """1 - drop x (events up to and with the token) + base in each half of the tokens."""
    events = [n < least for n in common]
    counts = [sum(events[: t + 1]) if t < 6 else sum(events[6 : t + 1]) for t in range(12)]
    return torch.tensor([max(0.0, 1 - drop * n) + base for n in counts], dtype=torch.float64)


def test_prune_opd_fades_the_bonus_of_antisd_and_not_the_outcome():
    method = of_recipe("prune_antisd")
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
    step, u, common = two_sequences(method, reward=reward, correct=reward > 0, state={"gate": {"open": True}})
    outcomes = torch.tensor([0.5] * 6 + [-0.5] * 6, dtype=torch.float64) / (0.5**0.5 + 1e-6)
    fade = faded(common, 3, 0.2, 0.0)
    expected = outcomes - 0.5 * (torch.nn.functional.softplus(u) - log(2)) / 2 * fade
    assert len(set(fade.tolist())) > 3 and (method.terms[0].signal(step) - expected).abs().max() < 1e-12
    closed = replace(step, state={"gate": {"open": False}})
    assert torch.equal(method.terms[0].signal(closed), outcome()(closed))


def test_uni_opd_s_margins_under_prune_opd_s_weights():
    """The shift is made of whole rewards; the weight then says how much each token counts."""
    method = of_recipe("uni_prune")
    correct = torch.tensor([False, True])
    step, u, common = two_sequences(method, reward=correct.double(), correct=correct)
    gap = 0.4 - float(u[6:].mean() - u[:6].mean())
    assert gap > 0
    shifted = u + torch.tensor([-gap / 2] * 6 + [gap / 2] * 6, dtype=torch.float64)
    term = method.terms[0]
    fade = faded(common, 2, 0.2, 0.2)
    assert (term.signal(step) - shifted).abs().max() < 1e-12 and (term.weight(step) - fade).abs().max() < 1e-12
    assert len(set(fade.tolist())) > 1 and method.controllers[0].of == reliable(
        event=low_overlap(k=4, below=0.5), drop=0.2
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_spelt_out_method_trains_like_the_published_one(recipe_data, tmp_path):
    text = {"name": "compose", "views": {"teacher": "View('teacher', TopK(4))"},
            "terms": ["Term(signal=log_ratio() - expected_log_ratio())"]}  # fmt: skip
    first = run(recipe_data, method={"name": "vopd", "k": 4}, train__steps=2, output=str(tmp_path / "a"))
    second = run(recipe_data, method=text, train__steps=2, output=str(tmp_path / "b"))
    assert same(weights(first), weights(second))


def test_combinations_run_and_resume_without_a_new_file(recipe_data):
    """vOPD's baseline, SOD's weights, GRPO's advantage, Prune-OPD's reliability and controller, and EffOPD, in one."""
    event = "low_overlap(k=4, below=0.9)"
    method = {
        "name": "compose", "base": {"name": "vopd", "k": 4},
        "weight": f"turn_weight() * reliability(event={event}, drop=0.5, base=0.1)",
        "add": ["Term(loss=ClippedPolicyGradient(), signal=outcome())"],
        "controllers": [f"LengthControl(reliable(event={event}, drop=0.5), start=6, least=3, step=1, margin=1)"],
        "watch": {"drift": event}, "after_update": ["EffOPD(problems=4, tries=1, accept='no_worse')"],
    }  # fmt: skip
    path = run(recipe_data, method=method, train__steps=2)
    run(recipe_data, method=method, train__steps=4, resume=True)
    rows = metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(0 <= row["drift"] <= 1 for row in rows)
    assert all(row["response_length"] <= 8 and "length/limit" in row for row in rows) and rows[1]["jump/responses"] == 8
