"""The process that judges answers for `isolated`: pickled requests on stdin, pickled replies on stdout.

Run as a script and not imported: it must start fast, so it imports neither opdkit nor torch.
"""

import functools
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

# What third-party scorers raise on an answer that they cannot read.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)

_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_PROSE = re.compile(r"[^\W\d_]{4,}")  # four letters in a row: a word, not a product of variables


def gym_scorer(name: str, settings: dict[str, Any]) -> Callable[[str, dict[str, Any]], float]:
    """reasoning-gym's own scorer; an answer that it cannot read scores 0."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **settings)

    def score(answer: str, entry: dict[str, Any]) -> float:
        try:
            return float(dataset.score_answer(answer, entry))
        except UNREADABLE:
            return 0.0

    return score


def math_scorer() -> Callable[[str, str | None], bool | str]:
    """Compare a response with a gold answer through math-verify; "gold" when the gold answer cannot be parsed.

    Its own timeouts use signal.alarm, which cannot interrupt an integer power: they are off, the parent's clock counts.
    """
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timeouts are off

    def expression(text: str) -> list[Any]:
        inner = text.strip().strip("$")
        # As LaTeX first: as plain text, "x^2+1" would be read as its last number. A word is no product of its letters.
        if _PROSE.search(_COMMAND.sub("", inner)) is None:
            found = parse(rf"\boxed{{{inner}}}", fallback_mode="no_fallback", parsing_timeout=None)
            if found:
                return list(found)
        return list(parse(text, fallback_mode="no_fallback", parsing_timeout=None))

    @functools.lru_cache(maxsize=4096)
    def gold(answer: str) -> list[Any]:
        answer = answer.rsplit("####", 1)[-1]  # GSM8K: solution, then "#### 18"
        boxed = last_boxed(answer)
        return expression(answer if boxed is None else boxed)

    def score(answer: str, response: str | None) -> bool | str:
        expected = gold(answer)
        if not expected:
            return "gold"
        if response is None:  # only the gold answer is to be checked
            return True
        boxed = last_boxed(response)
        given = parse(response, parsing_timeout=None) if boxed is None else expression(boxed)
        return bool(verify(expected, given, timeout_seconds=None))

    return score


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close; math-verify would join several of them."""
    start = len(text)
    while (start := text.rfind(r"\boxed{", 0, start)) >= 0:
        depth = 0
        for end in range(start + len(r"\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len(r"\boxed{") : end]
    return None


def main() -> None:
    """Answer requests until stdin closes. The first one says which scorer; the reply to it is None or an error text."""
    # Ctrl-C reaches the whole process group, and the run still has a step to finish and to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a scorer that prints must not write into the replies
    kind, *arguments = pickle.load(sys.stdin.buffer)
    try:
        scorer: Callable[..., Any] = gym_scorer(*arguments) if kind == "gym" else math_scorer()
    except (ImportError, *UNREADABLE) as error:
        _reply(replies, f"{type(error).__name__}: {error}")
        return
    _reply(replies, None)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        _reply(replies, scorer(*request))


def _reply(replies: Any, value: Any) -> None:
    pickle.dump(value, replies)
    replies.flush()


if __name__ == "__main__":
    main()
