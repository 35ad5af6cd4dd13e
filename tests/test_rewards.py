"""Verifiers: math-verify in its own process, exact comparison, and what a weird answer does."""

import os
import signal
import threading

import pytest

from opdkit.errors import DataError, OpdkitError
from opdkit.rewards.answers import check_math_answers, verify_exact, verify_math
from opdkit.rewards.isolated import Isolated
from opdkit.rewards.verify import verify_rollouts
from opdkit.rewards.worker import last_boxed
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.problem import Problem, Task, Verdict


def problem(answer, id="p1"):
    return Problem(id=id, prompt="q", answer=answer)


def rollout(text, answer="7"):
    return Rollout(problem(answer), prompt_ids=(1,), response_ids=(2,), text=text, group=0, finish="stop")


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("214", r"first \boxed{213}, no: \boxed{214}", True),  # math-verify alone joins them to 213214
        ("213", r"first \boxed{213}, no: \boxed{214}", False),
        ("214", "57 + 87 + 70 = 214.", True),
        ("1/2", r"\boxed{\frac{1}{2}}", True),
        (r"\frac{1}{2}", "so $0.5$", True),
        ("x^2+1", r"\boxed{1+x^2}", True),
        ("She has 4 + 4 = 8\n#### 1,008", "The answer is 1008", True),
        ("10 apples", r"\boxed{10}", True),
        ("18 dollars", r"\boxed{18 dollars}", True),
        (r"\text{yes}", r"\boxed{\text{yes}}", True),
        ("-3", "3", False),
    ],
)
def test_math_compares_values_not_spelling(answer, response, correct):
    assert verify_math(problem(answer), response) == Verdict(reward=float(correct), correct=correct)


@pytest.mark.parametrize(
    "response", ["", " ", r"\boxed{", r"\boxed{}", "∞½\x00", "{" * 3000, "1/0", "no idea", r"\frac{1}{0}", "$$"]
)
def test_math_gives_zero_for_a_response_that_it_cannot_parse(response):
    assert verify_math(problem("7"), response) == Verdict(reward=0.0, correct=False)


@pytest.mark.parametrize("answer", ["Paris", "???", "{"])
def test_math_names_the_problem_whose_answer_it_cannot_parse(answer):
    with pytest.raises(DataError, match=r"problem p9: the answer .* set task\.verifier: exact"):
        verify_math(problem(answer, id="p9"), "7")
    with pytest.raises(DataError, match="problem p9"):
        check_math_answers([problem("3.5"), problem(answer, id="p9")])


def test_the_check_of_answers_is_bounded_and_does_not_count_plain_numbers():
    many = [problem("1"), problem("-2.5"), problem("3/4"), problem("$x$"), problem("Paris")]
    check_math_answers(many, at_most=1)
    with pytest.raises(DataError, match="Paris"):
        check_math_answers(many, at_most=2)


@pytest.mark.parametrize("verify", [verify_math, verify_exact])
def test_a_verifier_without_an_answer_says_what_to_do(verify):
    with pytest.raises(DataError, match=r"problem p1 has no answer .* task\.verifier: none"):
        verify(problem(None), "7")


def test_exact_ignores_only_white_space_at_the_ends():
    assert verify_exact(problem(" a b "), "a b\n") == Verdict(1.0, True)
    assert verify_exact(problem("a b"), "a  b") == Verdict(0.0, False)


def test_last_boxed_takes_the_last_closed_braces():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} and \boxed{2") == "1"
    assert last_boxed("none") is None


def test_an_answer_that_never_ends_counts_as_wrong_and_the_next_one_is_judged():
    scorer = Isolated(("math",), seconds=2.0)
    assert scorer("214", "214") is True
    assert scorer("214", "9**9**9**9") is None
    assert scorer("214", "214") is True


def test_the_process_survives_ctrl_c_and_is_replaced_when_it_dies():
    scorer = Isolated(("math",))
    assert scorer("3", "3") is True
    first = scorer._process.pid
    os.kill(first, signal.SIGINT)
    os.kill(first, signal.SIGTERM)
    assert scorer("3", "4") is False
    assert scorer._process.pid == first
    os.kill(first, signal.SIGKILL)
    assert scorer("3", "3") is True
    assert scorer._process.pid != first


def test_a_scorer_that_cannot_start_says_why():
    with pytest.raises(OpdkitError, match=r"'gym' scorer cannot start: ValueError: Dataset 'nope' not registered"):
        Isolated(("gym", "nope", {}))("1", {})


def test_math_works_in_threads():
    verdicts = {}

    def work(value):
        verdicts[value] = [verify_math(problem(str(value)), f"so {i}").correct for i in range(4)]

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {value: [i == value for i in range(4)] for value in range(4)}


def test_verify_rollouts_sets_reward_and_correct_in_order():
    task = Task("t", [], [], verify=lambda problem, text: Verdict(reward=len(text) / 4, correct=text == problem.answer))
    done = verify_rollouts(task, [rollout("7"), rollout("77")])
    assert [(r.reward, r.correct) for r in done] == [(0.25, True), (0.5, False)]


def test_verify_rollouts_without_verifier_leaves_them_alone():
    rollouts = [rollout("7")]
    assert verify_rollouts(Task("t", [], []), rollouts) == rollouts
    assert rollouts[0].reward is None


def test_a_verifier_that_raises_is_named_with_the_problem():
    def picky(problem: Problem, text: str) -> Verdict:
        raise KeyError("units")

    with pytest.raises(
        DataError, match=r"verifier .*picky of task 't' failed on problem p1: KeyError: 'units'; response: 'abc'"
    ):
        verify_rollouts(Task("t", [], [], verify=picky), [rollout("abc")])


def test_a_clear_error_of_a_verifier_passes_through():
    with pytest.raises(DataError, match=r"^problem p1 has no answer"):
        verify_rollouts(Task("t", [], [], verify=verify_math), [rollout("7", answer=None)])


def test_the_process_ends_with_its_scorer():
    scorer = Isolated(("math",))
    assert scorer("3", "3") is True
    process = scorer._process
    del scorer
    assert process.poll() == -signal.SIGKILL
