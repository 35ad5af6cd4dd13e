"""From problems to prompt token ids, with every limit checked before a model runs.

Left out: padding and batching (the sampler's work), images, and responses (`turns`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from opdkit.config import TaskConfig
from opdkit.errors import DataError, ModelError, RecipeError
from opdkit.tasks.messages import prompt_messages
from opdkit.tasks.problem import PROBE, LazySequence, Message, Problem

_OURS = ("messages", "tools", "add_generation_prompt")
_NO_ARGS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class EncodedProblems(LazySequence[tuple[Problem, tuple[int, ...]]]):
    """Problems with their prompt ids, encoded when they are read; `dropped` prompts were over the limit."""

    problems: Sequence[Problem]
    tokenizer: PreTrainedTokenizerBase
    config: TaskConfig
    context_length: int  # tokens
    max_new_tokens: int  # tokens
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.problems)

    def item(self, index: int) -> tuple[Problem, tuple[int, ...]]:
        return self.many([index])[0]

    def many(self, indices: Iterable[int]) -> list[tuple[Problem, tuple[int, ...]]]:
        problems = [self.problems[i] for i in indices]
        found = list(zip(problems, self.encode(problems), strict=True))
        for problem, ids in found:
            if len(ids) > self.config.max_prompt_tokens:
                raise DataError(
                    f"prompt of problem {problem.id} has {len(ids)} tokens, task.max_prompt_tokens is "
                    f"{self.config.max_prompt_tokens}; raise it, or set task.overlong: drop"
                )
        return found

    def fits(self, problem: Problem) -> bool:
        """Whether the prompt is within task.max_prompt_tokens. Raises DataError where it could not be used at all."""
        return len(self.encode([problem])[0]) <= self.config.max_prompt_tokens

    def encode(self, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
        """Prompt ids that leave room in the context, or that are over task.max_prompt_tokens anyway."""
        config = self.config
        found = encode_prompts(self.tokenizer, problems, config.template, config.system, config.template_args)
        room = self.context_length - self.max_new_tokens
        for problem, ids in zip(problems, found, strict=True):
            if room < len(ids) <= self.config.max_prompt_tokens:
                raise DataError(
                    f"prompt of problem {problem.id} has {len(ids)} tokens; with sampling.max_new_tokens = "
                    f"{self.max_new_tokens} that is over the model's context of {self.context_length}; lower "
                    f"sampling.max_new_tokens to {self.context_length - len(ids)}, or set task.max_prompt_tokens: {room} "
                    "with task.overlong: drop"
                )
        return found


def encode_problems(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    config: TaskConfig,
    context_length: int,
    max_new_tokens: int,
) -> EncodedProblems:
    """A sequence of (problem, prompt ids) within task.max_prompt_tokens and the context (all in tokens).

    A list or tuple of problems is checked whole; of a generated sequence the first 16, the others when they are read,
    unless task.overlong is `drop`. Raises DataError for an unusable prompt or when none is left, RecipeError when
    max_new_tokens alone fills the context or an entry of task.template_args has no effect, ModelError when there is no
    chat template.
    """
    if max_new_tokens >= context_length:
        raise RecipeError(
            f"max_new_tokens = {max_new_tokens} leaves no room for a prompt in the model's context of {context_length} "
            "tokens; lower sampling.max_new_tokens (and eval.max_new_tokens)"
        )
    if not problems:
        raise DataError("an empty data set: there is no problem to encode")
    if config.template == "chat":
        listed = problems if isinstance(problems, list | tuple) else ()
        probe = [*problems[:PROBE], *[problem for problem in listed if problem.tools][:1]]
        check_template(tokenizer, probe, config.system, config.template_args, "task.template_args")
    encoded = EncodedProblems(problems, tokenizer, config, context_length, max_new_tokens)
    if config.overlong == "error":
        for index in range(len(problems) if isinstance(problems, list | tuple) else min(PROBE, len(problems))):
            _ = encoded[index]
        return encoded
    kept = [problem for problem in problems if encoded.fits(problem)]
    if not kept:
        raise DataError(
            f"an empty data set: all {len(problems)} prompts are over task.max_prompt_tokens = "
            f"{config.max_prompt_tokens} and task.overlong is 'drop'; raise the limit"
        )
    return EncodedProblems(kept, tokenizer, config, context_length, max_new_tokens, len(problems) - len(kept))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    template: Literal["chat", "plain"],
    system: str | None,
    template_args: Mapping[str, Any] = _NO_ARGS,
) -> tuple[int, ...]:
    """Token ids of one prompt: see `encode_prompts`."""
    return encode_prompts(tokenizer, [problem], template, system, template_args)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    template: Literal["chat", "plain"],
    system: str | None,
    template_args: Mapping[str, Any] = _NO_ARGS,
) -> list[tuple[int, ...]]:
    """Token ids of prompts, ready for the responses to follow.

    `chat` applies the tokenizer's chat template with the generation prompt; a string becomes a user message; the system
    message is the messages' own, else the problem's, else `system`. `plain` is the text with the tokenizer's BOS, if it
    adds one. Raises ModelError without a chat template, DataError for a prompt that is empty or unfit for the template.
    """
    for problem in problems:
        if isinstance(problem.prompt, str) and not problem.prompt.strip():
            raise DataError(f"prompt of problem {problem.id} is empty; give it a text")
    if template == "chat":
        texts = [
            render(tokenizer, problem, prompt_messages(problem, system), template_args, generation=True)
            for problem in problems
        ]
        found = _all_ids(tokenizer, texts, special=False)
    else:
        found = _plain_ids(tokenizer, problems)
    for problem, ids in zip(problems, found, strict=True):
        if not ids:
            raise DataError(f"prompt of problem {problem.id} has no tokens: the tokenizer drops all of its text")
    return [tuple(ids) for ids in found]


def render(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    messages: Sequence[Message],
    template_args: Mapping[str, Any],
    *,
    generation: bool,
) -> str:
    """The text of messages through the chat template, with the problem's tools.

    `generation` ends it with what precedes a response. Raises ModelError without a chat template, DataError for messages
    that the template refuses.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; set task.template: plain (raw text), "
            "or use a model whose tokenizer has one"
        )
    tools: Any = None if problem.tools is None else [dict(tool) for tool in problem.tools]
    shown = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            shown, tools=tools, add_generation_prompt=generation, tokenize=False, **template_args
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:  # templates refuse roles and contents in these ways
        raise DataError(
            f"the chat template of '{tokenizer.name_or_path}' refuses the messages of problem {problem.id} "
            f"({type(error).__name__}: {error}); roles: {', '.join(str(message.get('role')) for message in messages)}"
        ) from error
    return cast(str, text)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a rendered text: the template has written the special tokens, so the tokenizer adds none."""
    return _all_ids(tokenizer, [text], special=False)[0]


def _all_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    """Ids of several texts in one call, which takes a third to half of the time of one call for each."""
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=special)["input_ids"]) if texts else []


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    system: str | None,
    template_args: Mapping[str, Any],
    where: str,
) -> None:
    """Raise where the chat template ignores what it is given, judged by its text for these problems.

    RecipeError for an entry of `template_args` (called `where`): the text is the same without it, and for a boolean also
    with the opposite. DataError for tools that the template does not show.
    """
    for name in template_args:
        if name in _OURS:
            raise RecipeError(f"{where}.{name} cannot be set: it comes from the data")

    def texts(args: Mapping[str, Any]) -> list[str]:
        found = []
        for problem in problems:
            messages = prompt_messages(problem, system)
            found.append(render(tokenizer, problem, messages, args, generation=True))
            if isinstance(problem.response, tuple):  # some arguments are about the history only
                found.append(render(tokenizer, problem, [*messages, *problem.response], args, generation=False))
        return found

    for name, value in template_args.items():
        without = texts({key: other for key, other in template_args.items() if key != name})
        tried = [value, not value] if isinstance(value, bool) else [value]  # a default may be spelled out
        if all(texts({**template_args, name: one}) == without for one in tried):
            raise RecipeError(
                f"{where}.{name} = {value!r} has no effect: the chat template of '{tokenizer.name_or_path}' gives the same "
                "text without it; remove it, or correct its name or value"
            )
    if (asked := next((problem for problem in problems if problem.tools), None)) is not None:
        _check_tools(tokenizer, asked, system, template_args)


def _check_tools(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, system: str | None, template_args: Mapping[str, Any]
) -> None:
    messages = prompt_messages(problem, system)
    shown, bare = (
        render(tokenizer, one, messages, template_args, generation=True)
        for one in (problem, replace(problem, tools=None))
    )
    if shown == bare:
        raise DataError(
            f"the chat template of '{tokenizer.name_or_path}' does not show the tools of problem {problem.id}; use a model "
            "whose template has tools, or describe them in the prompt: set tools.show: system where they are the recipe's, "
            "leave the column out where they are the data's"
        )


def _plain_ids(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    texts = [_plain_text(problem) for problem in problems]
    found = _all_ids(tokenizer, texts, special=True)
    return [_open(tokenizer, text, ids) for text, ids in zip(texts, found, strict=True)]


def _open(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Some tokenizers close every text with EOS; a response cannot follow it."""
    ends = tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if ends and not text.endswith(str(tokenizer.eos_token)) else ids


def _plain_text(problem: Problem) -> str:
    if not isinstance(problem.prompt, str):
        raise DataError(f"prompt of problem {problem.id} is a list of messages; task.template 'plain' needs a string")
    if problem.system is not None:
        raise DataError(
            f"problem {problem.id} has a system prompt, which task.template 'plain' would ignore; remove one"
        )
    if problem.tools is not None:
        raise DataError(f"problem {problem.id} has tools, which task.template 'plain' would ignore; remove the column")
    return problem.prompt
