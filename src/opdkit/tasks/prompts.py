"""From problems to prompt token ids, with every limit checked before a model runs.

Left out: padding and batching (the sampler's work), images, and tool schemas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

from transformers import PreTrainedTokenizerBase

from opdkit.config import TaskConfig
from opdkit.errors import DataError, ModelError, RecipeError
from opdkit.tasks.problem import Problem

_PROBE = 16


@dataclass(frozen=True)
class EncodedProblems(Sequence[tuple[Problem, tuple[int, ...]]]):
    """Problems with their prompt ids, encoded when they are read; `dropped` prompts were over the limit."""

    problems: Sequence[Problem]
    tokenizer: PreTrainedTokenizerBase
    config: TaskConfig
    context_length: int  # tokens
    max_new_tokens: int  # tokens
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> tuple[Problem, tuple[int, ...]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Problem, tuple[int, ...]]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[Problem, tuple[int, ...]] | list[tuple[Problem, tuple[int, ...]]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        problem = self.problems[index]
        ids = self.encode(problem)
        if len(ids) > self.config.max_prompt_tokens:
            raise DataError(
                f"prompt of problem {problem.id} has {len(ids)} tokens, task.max_prompt_tokens is "
                f"{self.config.max_prompt_tokens}; raise it, or set task.overlong: drop"
            )
        return problem, ids

    def fits(self, problem: Problem) -> bool:
        """Whether the prompt is within task.max_prompt_tokens. Raises DataError where it could not be used at all."""
        return len(self.encode(problem)) <= self.config.max_prompt_tokens

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids that leave room in the context, or that are over task.max_prompt_tokens anyway."""
        ids = encode_prompt(self.tokenizer, problem, self.config.template, self.config.system)
        room = self.context_length - self.max_new_tokens
        if room < len(ids) <= self.config.max_prompt_tokens:
            raise DataError(
                f"prompt of problem {problem.id} has {len(ids)} tokens; with sampling.max_new_tokens = "
                f"{self.max_new_tokens} that is over the model's context of {self.context_length}; lower "
                f"sampling.max_new_tokens to {self.context_length - len(ids)}, or set task.max_prompt_tokens: {room} "
                "with task.overlong: drop"
            )
        return ids


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
    max_new_tokens alone fills the context, ModelError when there is no chat template.
    """
    if max_new_tokens >= context_length:
        raise RecipeError(
            f"max_new_tokens = {max_new_tokens} leaves no room for a prompt in the model's context of {context_length} "
            "tokens; lower sampling.max_new_tokens (and eval.max_new_tokens)"
        )
    if not problems:
        raise DataError("an empty data set: there is no problem to encode")
    encoded = EncodedProblems(problems, tokenizer, config, context_length, max_new_tokens)
    if config.overlong == "error":
        for index in range(len(problems) if isinstance(problems, list | tuple) else min(_PROBE, len(problems))):
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
    tokenizer: PreTrainedTokenizerBase, problem: Problem, template: Literal["chat", "plain"], system: str | None
) -> tuple[int, ...]:
    """Token ids of a prompt, ready for the response to follow.

    `chat` applies the tokenizer's chat template with the generation prompt; a string becomes a user message; the system
    message is the messages' own, else the problem's, else `system`. `plain` is the text with the tokenizer's BOS, if it
    adds one. Raises ModelError without a chat template, DataError for a prompt that is empty or unfit for the template.
    """
    if isinstance(problem.prompt, str) and not problem.prompt.strip():
        raise DataError(f"prompt of problem {problem.id} is empty; give it a text")
    ids = _chat_ids(tokenizer, problem, system) if template == "chat" else _plain_ids(tokenizer, problem)
    if not ids:
        raise DataError(f"prompt of problem {problem.id} has no tokens: the tokenizer drops all of its text")
    return tuple(ids)


def _chat_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem, system: str | None) -> list[int]:
    import jinja2

    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of '{tokenizer.name_or_path}' has no chat template; set task.template: plain (raw text), "
            "or use a model whose tokenizer has one"
        )
    if isinstance(problem.prompt, str):
        messages: list[dict[str, Any]] = [{"role": "user", "content": problem.prompt}]
    else:
        messages = [dict(message) for message in problem.prompt]
    text = problem.system if problem.system is not None else system
    if text is not None and (not messages or messages[0].get("role") != "system"):
        messages.insert(0, {"role": "system", "content": text})
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (jinja2.TemplateError, TypeError, KeyError) as error:  # templates refuse roles and contents in these ways
        raise DataError(
            f"the chat template of '{tokenizer.name_or_path}' refuses the prompt of problem {problem.id} "
            f"({type(error).__name__}: {error}); roles: {', '.join(str(message.get('role')) for message in messages)}"
        ) from error
    return cast(list[int], ids)


def _plain_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    if not isinstance(problem.prompt, str):
        raise DataError(f"prompt of problem {problem.id} is a list of messages; task.template 'plain' needs a string")
    if problem.system is not None:
        raise DataError(
            f"problem {problem.id} has a system prompt, which task.template 'plain' would ignore; remove one"
        )
    ids = tokenizer.encode(problem.prompt)
    ends = tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]
    # Some tokenizers close every text with EOS; a response cannot follow it.
    return ids[:-1] if ends and not problem.prompt.endswith(str(tokenizer.eos_token)) else ids
