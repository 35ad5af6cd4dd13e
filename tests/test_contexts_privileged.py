"""What a privileged context shows: its texts, where they stand, who has none, and what is refused at the start."""

import json
from dataclasses import replace

import pytest
from test_loop import metrics, run
from test_turns import LLAMA, PHI, QWEN, make_lm, prompt, said, user

from opdkit.catalogue import build_method
from opdkit.config import ModelConfig, TaskConfig
from opdkit.contexts import Feedback, Material, Shown, Sibling, Solution, without_thinking
from opdkit.errors import DataError, MethodError, RecipeError
from opdkit.method import Method, Term, View
from opdkit.pmi import gated, informed
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.rollout import Rollout
from opdkit.signals import log_ratio
from opdkit.tasks.contexts import check_told, reread
from opdkit.tasks.problem import Problem, Task, Verdict
from opdkit.tasks.prompts import encode_prompt

CHAT, PLAIN = TaskConfig(kind="file"), TaskConfig(kind="file", template="plain")
STUDENT = make_lm(QWEN)
TEXT = Material(STUDENT.tokenizer)
LINES = Material(STUDENT.tokenizer, plain=True)
P = Problem("p", "2+2?", answer="4", response="2 and 2 are 4", metadata={"hint": "even"})


def rollout(text="x", reward=0.0, group=0, problem=P, **fields):
    return Rollout(problem, (1, 2), (7, 8), text, group, "stop", reward=reward, correct=bool(reward), **fields)


def told(context, rollouts, material=TEXT):
    return [None if p is None else p.prompt for p in context.rewrite(rollouts, material)]


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize(("of", "text"), [("auto", "2 and 2 are 4"), ("response", "2 and 2 are 4"), ("answer", "4"),
                                          ("metadata.hint", "even"), ("metadata.other", None)])  # fmt: skip
def test_a_solution_is_a_column_of_the_data(of, text):
    assert Solution(of).texts([rollout()], TEXT) == [text]


def test_a_solution_falls_back_on_what_the_task_writes_and_then_on_the_answer():
    bare = Problem("p", "2+2?", answer="4")
    written = Material(STUDENT.tokenizer, target=lambda p: f"worked {p.answer}")
    assert [Solution(of).text(bare, written) for of in ("auto", "response", "answer")] == ["worked 4", "worked 4", "4"]
    assert [Solution(of).text(bare, TEXT) for of in ("auto", "response", "answer")] == ["4", None, "4"]
    assert Solution().text(Problem("p", "q"), TEXT) is None
    turns = (said("first"), {"role": "tool", "content": "9"}, said("second"))
    assert Solution().text(Problem("p", "q", response=turns), TEXT) == "first\n\nsecond"


def test_a_sibling_is_the_first_success_of_the_group_and_not_itself():
    group = [rollout("a", 0.0), rollout("b", 1.0), rollout("c", 1.0), rollout("d", 0.5), rollout("e", 1.0, group=1),
             rollout("f", 0.0, group=2)]  # fmt: skip
    assert Sibling().texts(group, TEXT) == ["b", "c", "b", "b", None, None]
    assert Sibling(threshold=0.5).texts(group[3:], TEXT) == [None, None, None]
    assert Sibling(threshold=0.5).texts(group[2:4], TEXT) == ["d", "c"]
    assert Sibling().texts([rollout("a", None), rollout("b", None)], TEXT) == [None, None]


@pytest.mark.parametrize(("text", "kept"), [("<think>a</think>b", "b"), ("a</think> b", "b"), ("b<think>a", "b"), ("b", "b"),
                                            ("<think>a</think>b<think>c</think>d", "bd"), ("<think>a", "")])  # fmt: skip
def test_thinking_is_left_out(text, kept):
    assert without_thinking(text) == kept


def test_a_sibling_that_only_thought_is_passed_over_unless_its_thinking_is_shown():
    group = [rollout("<think>a", 1.0), rollout("<think>b</think>c", 1.0), rollout("d", 0.0)]
    assert Sibling().texts(group, TEXT) == ["c", None, "c"]
    assert Sibling(thinking=True).texts(group, TEXT)[2] == "<think>a"


def test_feedback_is_the_verifiers():
    def verify(problem, text):
        return Verdict(0.0, False, feedback=f"{text} is wrong" if text else None)

    rollouts = verify_rollouts(Task("t", (), (), verify), [rollout("5"), rollout("")])
    assert Feedback().texts(rollouts, TEXT) == ["5 is wrong", None]


# ---------------------------------------------------------------------------------------------------------------------
# Where they stand


def test_one_user_turn_problem_heading_text_assessment_instruction():
    context = Shown((Sibling(), Solution("answer")), assess=True, style="attempt")
    assert told(context, [rollout("a"), rollout("right", 1.0), rollout("b", group=1)]) == [
        "2+2?\n\nHere is an earlier attempt at this problem:\nright\n\nThe response that follows is judged: incorrect\n\n"
        "Solve the problem step by step.",
        "2+2?\n\nHere is an earlier attempt at this problem:\n4\n\nThe response that follows is judged: correct\n\n"
        "Solve the problem step by step.",
        "2+2?\n\nHere is an earlier attempt at this problem:\n4\n\nThe response that follows is judged: incorrect\n\n"
        "Solve the problem step by step.",
    ]


def test_the_verifiers_words_are_the_assessment():
    context = Shown((Solution("answer"),), assess=True, heading="", instruction="")
    assert told(context, [rollout(feedback="passes 3 of 5 tests")]) == [
        "2+2?\n\n4\n\nThe response that follows is judged: passes 3 of 5 tests"
    ]


def test_all_texts_or_the_first():
    both = Shown((Sibling(), Feedback()), every=True, heading="H", instruction="I")
    group = [
        rollout("ok", 1.0),
        rollout("no", feedback="bad"),
        rollout("alone", group=1, feedback="bad"),
        rollout("none", group=2),
    ]
    assert told(both, group) == [
        None, "2+2?\n\nH\nok\n\nHere is feedback on your earlier attempt:\nbad\n\nI",
        "2+2?\n\nHere is feedback on your earlier attempt:\nbad\n\nI", None,
    ]  # fmt: skip
    first = Shown((Sibling(), Feedback()), heading="H", instruction="I")
    assert told(first, group)[1] == "2+2?\n\nH\nok\n\nI"


def test_plain_text_has_one_line_for_each_and_the_problem_last():
    context = Shown((Sibling(), Solution()), assess=True, style="attempt")
    group = [rollout("a"), rollout("right", 1.0)]
    assert told(context, group, LINES) == ["right\nincorrect\n2+2?", "2 and 2 are 4\ncorrect\n2+2?"]
    with pytest.raises(DataError, match=r"problem m is a list of messages; task\.template 'plain' needs a string"):
        told(context, [rollout(problem=Problem("m", (user("q"),), answer="4"))], LINES)


def test_messages_keep_their_history_and_the_last_must_be_a_users():
    problem = Problem("m", ({"role": "system", "content": "s"}, user("a"), said("b"), user("c")), answer="4")
    (made,) = told(Shown((Solution(),), heading="", instruction=""), [rollout(problem=problem)])
    assert made == (*problem.prompt[:-1], user("c\n\n4"))
    with pytest.raises(DataError, match="problem m end with role 'assistant'; a context is shown in the last message"):
        told(Shown(), [rollout(problem=Problem("m", (user("a"), said("b")), answer="4"))])


def test_a_long_text_is_cut_to_its_first_tokens():
    context = Shown((Solution(),), heading="", instruction="", max_tokens=5)
    (made,) = told(context, [rollout()])
    kept = STUDENT.tokenizer.decode(STUDENT.tokenizer("2 and 2 are 4", add_special_tokens=False)["input_ids"][:5])
    assert made == f"2+2?\n\n{kept}" and "2 and 2 are 4".startswith(kept) and len(kept) < 13
    assert told(Shown(max_tokens=500, heading="", instruction=""), [rollout()]) == ["2+2?\n\n2 and 2 are 4"]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("template", [QWEN, PHI, LLAMA])
def test_it_is_read_through_the_chat_template_and_the_response_stays(template):
    lm = make_lm(template)
    given = [rollout(trained=(True, False), problem=p) for p in (P, Problem("n", "3?"))]
    shown = Shown((Solution(),), heading="H", instruction="I").rewrite(given, TEXT)
    found = reread(lm, "student", {}, given, CHAT, shown, lm.tokenizer)
    assert found[1] == given[1]  # nothing to show: its own prompt
    assert (found[0].response_ids, found[0].trained, found[0].problem) == ((7, 8), (True, False), P)
    asked = Problem("p", "2+2?\n\nH\n2 and 2 are 4\n\nI")
    assert found[0].prompt_ids == encode_prompt(lm.tokenizer, asked, "chat", None)
    assert "2+2?\n\nH\n2 and 2 are 4\n\nI" in prompt(lm, found[0])


def test_a_teacher_with_its_own_template_and_arguments_reads_it_so():
    lm, given = make_lm(QWEN), [rollout(), rollout(problem=Problem("n", "3?"))]
    shown = Shown().rewrite(given, TEXT)
    found = reread(lm, "own", {"enable_thinking": False}, given, CHAT, shown, STUDENT.tokenizer)
    assert all(prompt(lm, r).endswith("<think>\n\n</think>\n\n") for r in found)
    assert "2 and 2 are 4" in prompt(lm, found[0]) and prompt(lm, found[1]).count("3?") == 1


def test_members_of_a_group_may_read_different_prompts():
    group = [rollout("ok", 1.0), rollout("no"), rollout("also", 1.0)]
    found = reread(STUDENT, "student", {}, group, CHAT, Shown((Sibling(),)).rewrite(group, TEXT), STUDENT.tokenizer)
    assert ["also" in prompt(STUDENT, r) for r in found] == [True, False, False]
    assert found[1].prompt_ids == found[2].prompt_ids


def test_a_prompt_that_leaves_no_room_names_the_way_out():
    length = len(
        reread(STUDENT, "student", {}, [rollout()], CHAT, Shown().rewrite([rollout()], TEXT), STUDENT.tokenizer)[
            0
        ].prompt_ids
    )
    short = replace(make_lm(QWEN, context=length + 1), name="tutor")
    with pytest.raises(DataError, match=rf"problem p: teacher '{short.name}' reads {length} prompt tokens with its context, "
                                        rf"and with 2 response tokens that is over its context of {length + 1}; set the "
                                        r"method's max_tokens"):  # fmt: skip
        reread(short, "student", {}, [rollout()], CHAT, Shown().rewrite([rollout()], TEXT), STUDENT.tokenizer)
    config = ModelConfig(path="x")
    check_told(short, config, Shown(), [P], CHAT, TEXT, 1)
    with pytest.raises(DataError, match="set the method's max_tokens"):
        check_told(short, config, Shown(), [P], CHAT, TEXT, 2)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_data_set_without_solutions_is_refused_at_the_start():
    bare = [Problem("a", "q", metadata={"level": 3}), Problem("b", "r")]
    with pytest.raises(DataError, match=r"Solution\(\): no problem of the data set has such a text; name its column in "
                                        r"task.columns \(response or answer\), or show another one: .*level"):  # fmt: skip
        Shown().check(bare, TEXT)
    Shown().check([*bare, P], TEXT)
    Shown((Sibling(),)).check(bare, TEXT)


@pytest.mark.parametrize("setting", ["heading", "instruction"])
def test_words_that_plain_text_does_not_use_are_refused(setting):
    Shown(**{setting: "x"}).check([P], TEXT)
    with pytest.raises(RecipeError, match=f"{setting} has no effect with task.template 'plain'"):
        Shown(**{setting: "x"}).check([P], LINES)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Shown(()), "shows nothing"),
    (lambda: Shown(every=True), "no effect with one text"),
    (lambda: Shown(max_tokens=0), "at least 1 token"),
    (lambda: Solution("solution"), "expected auto, response, answer or metadata.KEY"),
    (lambda: Method(name="m", views={"teacher": View("teacher")}, terms=(Term(signal=log_ratio(), weight=informed()),)),
     "masks by the context of view 'teacher', which reads the rollout's own prompt"),
    (lambda: Method(name="m", views={"teacher": View("teacher")}, terms=(Term(signal=gated(of=log_ratio())),)),
     "reads the state of 'gate', but the controllers are none; add it"),
])  # fmt: skip
def test_compositions_without_sense_are_refused(make, message):
    with pytest.raises(MethodError, match=message):
        make()


def test_contexts_say_what_they_need_and_serialise():
    context = Shown((Sibling(0.5), Feedback(), Solution("answer")), every=True, assess=True)
    assert context.needs() == ("rollouts.reward", "rollouts.group", "rollouts.correct")
    method = Method(name="m", views={"t": View("t", context=context)}, terms=(Term(signal=log_ratio(num="t")),))
    assert method.needs_reward and method.needs_group
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert not build_method("opsd", {}).needs_reward


def test_a_run_without_the_column_stops_before_it_starts(recipe_data):
    with pytest.raises(DataError, match="no problem of the data set has such a text"):
        run(recipe_data, method={"name": "sdft", "k": 8, "demonstration": "metadata.proof"})
    with pytest.raises(RecipeError, match="group"):
        run(recipe_data, method={"name": "sdpo", "k": 8}, sampling__group=1)
    with pytest.raises(RecipeError, match="no verifier"):
        run(recipe_data, method={"name": "sdpo", "k": 8}, task__verifier="none")


def test_the_share_of_informed_rollouts_is_logged(recipe_data):
    path = run(recipe_data, method={"name": "opsd"}, train__steps=1, task__template="plain")
    assert metrics(path)[0]["informed"] == 1.0
