"""A method as a value: what is checked when it is built and on its step, pieces, schedules, serialising, lookup."""

import json
from pathlib import Path

import jaxtyping
import pytest
import torch
from synthetic import terms_of

import opdkit.methods
from opdkit.catalogue import build_method, explain, method_names, method_table
from opdkit.errors import MethodError, RecipeError
from opdkit.losses import CrossEntropy, Divergence, PolicyGradient, SupportPolicyGradient
from opdkit.method import Linear, Method, Term, View
from opdkit.pieces import Piece, make_piece, minus, piece, pipe, plus, scale, times
from opdkit.serialise import decode, encode
from opdkit.signals import clamp, expected_log_ratio, log_ratio, outcome, support_gap
from opdkit.sources import Dataset, OnPolicy
from opdkit.step import Candidates, Layout, Scores, Step
from opdkit.support import Full, Sampled, TopK
from opdkit.train.update import streams
from opdkit.weights import confidence, first_tokens, ones

TEACHER = {"teacher": View("teacher")}
SEQ = torch.tensor([0, 0, 1])
GAP = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # log q - log p on two candidates
STEP = Step(
    Layout(SEQ, SEQ, torch.tensor([0, 0])),
    torch.tensor([4, 5, 6]),
    {
        "student": Scores(torch.tensor([-1.0, -2.0, -3.0])),
        "teacher": Scores(
            torch.tensor([-3.0, -1.0, -2.5]),
            candidates=Candidates(torch.tensor([[0, 1]] * 3), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2),
                                  GAP, None, torch.zeros(3)),
        ),
    },
    reward=torch.tensor([1.0, 0.0]),
)  # fmt: skip
RATIO = [-2.0, 1.0, 0.5]  # log q(y) - log p(y)


def method(**changed) -> Method:
    """A method that fits together, with some of its parts replaced."""
    return Method(**{"name": "m", "views": TEACHER, "terms": (Term(signal=log_ratio()),)} | changed)


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: without the type checks of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# What is checked when a method is built


MISFITS = {
    "no terms": (dict(terms=()), "method m has no terms; give at least one Term"),
    "shares": (dict(rollouts={"policy": OnPolicy(0.5), "data": Dataset(0.4)}),
               "shares of its rollout sources must be positive and add up to 1, got policy 0.5, data 0.4"),
    "a negative share": (dict(rollouts={"policy": OnPolicy(1.5), "data": Dataset(-0.5)}), "must be positive"),
    "no rollouts": (dict(rollouts={}), "must be positive and add up to 1"),
    "view student": (dict(views={**TEACHER, "student": View("x")}), "view 'student' is recorded while sampling"),
    "view behaviour": (dict(views={**TEACHER, "behaviour": View("x")}), "view 'behaviour' is recorded while sampling"),
    "unread view": (dict(views={**TEACHER, "judge": View("x")}), "no term reads view 'judge'; remove it or use it"),
    "unknown source": (dict(terms=(Term(signal=log_ratio(), on="data"),)),
                       "a term trains on 'data', but the rollout sources are policy"),
    "no signal": (dict(terms=(Term(),)), r"PolicyGradient\(\) needs a signal such as log_ratio\(\)"),
    "a signal too many": (dict(terms=(Term(loss=CrossEntropy(), signal=log_ratio()),)),
                          r"CrossEntropy\(\) takes no signal; drop it"),
    "off-policy gradient": (dict(rollouts={"policy": OnPolicy(0.5), "data": Dataset(0.5)},
                                 terms=(Term(signal=log_ratio(), on="data"),)),
                            "trains on 'data', which the student did not sample; its expected gradient is only right"),
    "off-policy support gradient": (
        dict(rollouts={"data": Dataset()}, views={"teacher": View("teacher", TopK(4))},
             terms=(Term(loss=SupportPolicyGradient(), signal=support_gap(), on="data"),)),
        r"SupportPolicyGradient\(\) trains on 'data', which the student did not sample"),
    "unknown view": (dict(terms=(Term(signal=log_ratio(num="tutor")),)),
                     r"log_ratio\(num='tutor', den='student'\) reads view 'tutor', but the views are teacher; "
                     r"add views=\{'tutor': View"),
    "no views": (dict(views={}), "reads view 'teacher', but the views are none; add"),
    "weight's view": (dict(terms=(Term(signal=log_ratio(), weight=confidence(teacher="tutor")),)),
                      r"confidence\(teacher='tutor'\) reads view 'tutor'"),
    "loss's view": (dict(terms=(Term(signal=log_ratio()), Term(loss=Divergence(teacher="tutor")))),
                    "Divergence.* reads view 'tutor'"),
    "candidates": (dict(terms=(Term(loss=SupportPolicyGradient(), signal=support_gap()),)),
                   r"support_gap.* reads the candidates of view 'teacher', which has support Sampled\(\); "
                   r"give that view support=TopK\(k\)"),
    "candidates of full": (dict(views={"teacher": View("t", Full())},
                                terms=(Term(loss=SupportPolicyGradient(), signal=support_gap()),)),
                           r"which has support Full\(\); give that view support=TopK\(k\)"),
    "distribution": (dict(terms=(Term(loss=Divergence()),)),
                     r"reads the distribution of view 'teacher', which has support Sampled\(\); give that view "
                     r"support=TopK\(k\) or Full\(\)"),
    "tail of full": (dict(views={"teacher": View("t", Full())}, terms=(Term(loss=Divergence(tail="renormalise")),)),
                     r"tail = 'renormalise' has no effect on view 'teacher', which has support Full\(\)"),
    "a part inside": (dict(terms=(Term(signal=minus(log_ratio(), scale(0.5, expected_log_ratio()))),)),
                      r"expected_log_ratio\(teacher='teacher'\) reads the distribution of view 'teacher'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_method_that_does_not_fit_says_what_to_change(case):
    changed, message = MISFITS[case]
    with pytest.raises(MethodError, match=message):
        method(**changed)


def test_one_view_may_serve_several_terms_and_a_view_may_be_any_model():
    terms = (Term(loss=Divergence(teacher="tutor")), Term(signal=log_ratio(num="tutor"), coef=0.1))
    built = method(views={"tutor": View("big", Full())}, terms=terms)
    assert not built.needs_reward and not built.needs_group
    graded = method(views={}, terms=(Term(signal=outcome()),))
    assert graded.needs_reward and graded.needs_group


@piece()
def undeclared(step: Step, *, rows: int = 3) -> torch.Tensor:
    """A piece of one's own that does not declare its shape: only the step can show that it is wrong."""
    return torch.zeros(rows, 2)


@pytest.mark.parametrize(("term", "message"), [
    (Term(signal=undeclared()), r"undeclared.* has shape \(3, 2\); Policy.* needs \[N\] with N = 3"),
    (Term(loss=SupportPolicyGradient(), signal=undeclared(rows=2)), r"has shape \(2, 2\); Support.* needs \[N, K\]"),
    (Term(signal=log_ratio(), weight=log_ratio()), r"must be \[N\] = \[3\] and never negative; .* smallest -2"),
    (Term(signal=log_ratio(), weight=undeclared()), r"weight undeclared.* got shape \(3, 2\)"),
])  # fmt: skip
def test_signals_and_weights_are_checked_on_the_step(term, message):
    built = method(views={"teacher": View("teacher", TopK(2))}, terms=(term, Term(loss=Divergence())))
    with pytest.raises(MethodError, match=message):
        streams(built, {"policy": STEP})


# Pieces


def test_pieces_are_values():
    assert log_ratio() == log_ratio(num="teacher") != log_ratio(num="tutor")
    assert repr(log_ratio()) == "log_ratio(num='teacher', den='student')"
    assert repr(scale(2.0, ones())) == "scale(2.0, ones())"
    assert minus(log_ratio(), ones()) == plus(log_ratio(), scale(-1.0, ones())) != minus(ones(), log_ratio())
    assert plus(ones(), first_tokens(n=1)).children == (ones(), first_tokens(n=1))
    assert [need for _, need in minus(log_ratio(num="a"), expected_log_ratio(teacher="b")).needs] == [
        "a.sampled", "student.sampled", "b.distribution"]  # fmt: skip


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(TypeError, match="log_ratio has no argument 'nun': did you mean 'num'"):
        log_ratio(nun="x")
    with pytest.raises(TypeError, match="first_tokens has no argument 'length'; known: n"):
        first_tokens(length=3)
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        first_tokens()
    with pytest.raises(ValueError, match="unknown piece 'log_ration': did you mean 'log_ratio'"):
        make_piece("log_ration", {})


def test_combinators_by_hand():
    assert log_ratio()(STEP).tolist() == RATIO
    assert plus(log_ratio(), ones(), ones())(STEP).tolist() == [0.0, 3.0, 2.5]
    assert minus(log_ratio(), scale(2.0, ones()))(STEP).tolist() == [-4.0, -1.0, -1.5]
    assert times(log_ratio(), first_tokens(n=1))(STEP).tolist() == [-2.0, 0.0, 0.5]
    assert scale(-3.0, log_ratio())(STEP).tolist() == [6.0, -3.0, -1.5]
    assert pipe(log_ratio())(STEP).tolist() == RATIO
    low, high = (lambda of: clamp(of=of, low=-1.0, high=9.0)), (lambda of: clamp(of=of, low=-9.0, high=0.7))
    assert pipe(log_ratio(), low, high) == clamp(of=clamp(of=log_ratio(), low=-1.0, high=9.0), low=-9.0, high=0.7)
    assert pipe(log_ratio(), low, high)(STEP).tolist() == pytest.approx([-1.0, 0.7, 0.5])
    assert confidence()(STEP).tolist() == pytest.approx([0.0497871, 0.3678794, 0.0820850], abs=1e-6)
    assert outcome(std=False)(STEP).tolist() == [0.5, 0.5, -0.5]
    assert outcome(eps=0.0)(STEP).tolist() == pytest.approx([0.5**0.5, 0.5**0.5, -(0.5**0.5)])  # unbiased std .7071


def test_a_factor_per_token_applies_to_every_candidate_in_any_order():
    gap, ratio = support_gap(by="uniform", raw=True), log_ratio()
    want = [[-2.0, -4.0], [3.0, 4.0], [2.5, 3.0]]
    assert times(gap, ratio)(STEP).tolist() == want
    assert times(gap, gap)(STEP).tolist() == GAP.square().tolist()
    assert times(gap, ratio, first_tokens(n=1))(STEP).tolist() == [want[0], [0.0, 0.0], want[2]]
    assert times(ratio, gap)(STEP).tolist() == want


def test_shapes_that_do_not_combine_are_named():
    with pytest.raises(
        ValueError, match=r"cannot combine .*log_ratio.*undeclared.*: shapes \(3,\) and \(3, 2\) differ"
    ):
        plus(log_ratio(), undeclared())(STEP)


# Serialising


NESTED = Method(
    name="nested",
    rollouts={"policy": OnPolicy(0.75), "data": Dataset(0.25)},
    views={"teacher": View("teacher", TopK(8, "union")), "tutor": View("big", Full())},
    terms=(
        Term(signal=minus(times(log_ratio(), first_tokens(n=3)), scale(0.5, clamp(of=log_ratio(), low=-1.0, high=1.0))),
             weight=times(confidence(), first_tokens(n=9)), coef=Linear(1.0, 0.2, until=0.5)),
        Term(loss=SupportPolicyGradient(), signal=support_gap(by="teacher"), coef=0.3),
        Term(loss=Divergence("jsd", mix=0.9, teacher="tutor"), on="data", reduction="seq_mean_token_mean"),
        Term(loss=CrossEntropy(), on="data", coef=2.0),
    ),
)  # fmt: skip


def test_nested_methods_survive_json():
    text = json.dumps(NESTED.to_dict())
    again = Method.from_dict(json.loads(text))
    assert again == NESTED and str(again) == str(NESTED) and json.dumps(again.to_dict()) == text
    assert again.terms[0].coefficient(0.25) == 0.6 and again.views["teacher"].support == TopK(8, "union")
    assert again.terms[0].signal(STEP).tolist() == NESTED.terms[0].signal(STEP).tolist() == [-1.5, 0.5, 0.25]


def test_key_order_of_the_file_does_not_matter():
    assert Method.from_dict(json.loads(json.dumps(NESTED.to_dict(), sort_keys=True))) == NESTED


def test_any_change_makes_another_method():
    changes = [
        dict(name="other"),
        dict(rollouts={"policy": OnPolicy(0.5), "data": Dataset(0.5)}),
        dict(terms=NESTED.terms[::-1]),
    ]
    fields = {f: getattr(NESTED, f) for f in ("name", "rollouts", "views", "terms")}
    assert Method(**fields) == NESTED
    for change in changes:
        assert Method(**fields | change) != NESTED


def test_printing_shows_one_part_a_line():
    assert str(method(terms=(Term(signal=log_ratio(), weight=first_tokens(n=2), coef=0.5),))).splitlines() == [
        "m:",
        "  rollouts  policy = OnPolicy()",
        "  view      teacher = View(model='teacher', support=Sampled(), context='own')",
        "  term      0.5 x token_mean on policy: PolicyGradient() of log_ratio(num='teacher', den='student'), "
        "weight first_tokens(n=2)",
    ]


def test_foreign_parts_are_not_serialised_and_not_loaded():
    class Foreign:
        def needs(self):
            return ()

        def check(self, shortest):
            pass

        def __call__(self, rollouts, batch):
            return rollouts

    with pytest.raises(MethodError, match=r"cannot serialise .* it is not one of the engine's pieces"):
        method(prepare=(Foreign(),)).to_dict()
    with pytest.raises(MethodError, match="cannot serialise"):
        encode({"x": object()})
    with pytest.raises(
        MethodError, match=r"unknown type 'Popen' in a serialised method; known: .*ClippedPolicyGradient, CrossEntropy"
    ):
        decode({"type": "Popen", "args": "ls"})
    assert decode(encode(Sampled())) == Sampled() and decode(encode((1, None, True))) == (1, None, True)
    with pytest.raises(MethodError, match="unknown piece 'log_ration': did you mean 'log_ratio'"):
        decode({"piece": "log_ration", "args": {}})


def test_linear_schedule():
    schedule = Linear(1.0, 0.2, until=0.5)
    assert [schedule(x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2], abs=1e-15)
    assert [Linear(0.0, 2.0)(x) for x in (0.0, 0.5, 1.0)] == [0.0, 1.0, 2.0]
    assert Term(signal=log_ratio(), coef=schedule).coefficient(0.25) == 0.6
    assert Term(signal=log_ratio(), coef=3.0).coefficient(0.25) == 3.0


def test_schedule_and_weight_reach_the_coefficients():
    """Weights (1, 0, 1): the mean counts two tokens. Progress .25 of Linear(1, .2, .5): .6."""
    term = Term(signal=log_ratio(), weight=first_tokens(n=1), coef=Linear(1.0, 0.2, until=0.5))
    step = Step(STEP.layout, STEP.tokens, STEP.views, progress=0.25)
    (found,) = terms_of(method(terms=(term,)), step)
    assert found.coef.tolist() == pytest.approx([0.3, 0.0, 0.3]) and found.signal.tolist() == RATIO
    (summed,) = terms_of(method(terms=(term,)), step, override="seq_mean_token_sum")
    assert summed.coef.tolist() == pytest.approx([0.3, 0.0, 0.3])
    (plain,) = terms_of(method(), step, override="seq_mean_token_mean")
    assert plain.coef.tolist() == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize("until", [0.0, -0.5])
def test_schedule_without_length_is_an_error(until):
    with pytest.raises(MethodError, match=f"until = {until}"):
        Linear(1.0, 0.0, until=until)


# The published methods


def test_method_files_are_short_and_named_after_their_function():
    files = [f for folder in opdkit.methods.__path__ for f in Path(folder).glob("*.py") if f.stem != "__init__"]
    assert sorted(f.stem for f in files) == method_names()
    for file in files:
        lines = file.read_text().splitlines()
        assert len(lines) <= 60, f"{file.name} has {len(lines)} lines"
        assert f"def {file.stem}(" in file.read_text() and lines[0].startswith('"""')


def test_method_table_names_idea_and_paper():
    table = {name: (line, paper) for name, line, paper in method_table()}
    assert list(table) == method_names() and "opd" in table
    idea = "vOPD: sampled-token on-policy distillation with its own value as a control variate"
    assert table["vopd"] == (idea, "arXiv:2605.07865")
    for name, (line, paper) in table.items():
        assert 20 < len(line) < 120
        assert paper == "" if name == "compose" else paper.startswith("arXiv:") and paper[6:10].isdigit()


def test_explain_shows_docstring_arguments_and_composition():
    text = explain("topk_kl")
    assert text.startswith("Differentiated reverse KL on a top-k support") and "(arXiv:2604.13016)" in text
    assert "\nArguments:\n  teacher: str = 'teacher'\n  k: int = 16\n" in text
    assert "Literal['bucket', 'renormalise', 'raw'] = 'bucket'" in text  # the choices, not only that there are some
    assert text.endswith("Composition with the defaults:\n" + str(build_method("topk_kl", {})))


def test_build_method_takes_arguments():
    assert build_method("vopd", {"k": 20}).views["teacher"].support == TopK(20)
    assert build_method("vopd", {}).views["teacher"].support == Full()
    assert build_method("opd", {}).terms[0].loss == PolicyGradient()
    assert isinstance(build_method("opd", {}).terms[0].signal, Piece)
    assert build_method("gkd", {"mix": 1.0, "on_policy_share": 1.0}).terms == build_method("full_opd", {}).terms


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("vopdd", {}, "unknown method 'vopdd': did you mean 'vopd'?"),
    ("reinforce", {}, "unknown method 'reinforce'; known: .*full_opd, gkd.*vopd"),
    ("vopd", {"kk": 20}, "method vopd has no argument 'kk': did you mean 'k'?"),
    ("opd", {"lambda": 1}, "method opd has no argument 'lambda'; known: .*teacher"),
    ("vopd", {"k": 0}, r"method vopd: TopK\(k=0\): k must be at least 1"),
    ("topk_opd", {"of": "both"}, "method topk_opd: .*of='both'.*expected .*student"),
    ("topk_kl", {"tail": "drop"}, "method topk_kl: tail.*'drop'.*expected .*'bucket'.*'renormalise'"),
    ("gkd", {"mix": 1.5}, "method gkd: mix = 1.5 must lie strictly between 0 and 1"),
    ("gkd", {"on_policy_share": 2.0}, r"method gkd: on_policy_share = 2.0 must lie in \[0, 1\]"),
    ("topk_opd", {"by": "mass"}, "method topk_opd: .*by='mass'.*expected .*student.*uniform"),
    ("vopd", {"k": 2.5}, "method vopd: .*k.*2.5"),
    ("vopd", {"k": "20"}, "method vopd: .*k.*20"),
    ("grpo", {"std": "no"}, "method grpo: .*std.*no"),
])  # fmt: skip
def test_build_method_errors_name_the_argument(unchecked, name, arguments, message):
    with pytest.raises(RecipeError, match=message):
        build_method(name, arguments)
