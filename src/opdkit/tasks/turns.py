"""The data set's responses as rollouts: which tokens the model writes, and which stand between its turns.

A response that is text is what the model writes, as it stands. A response that is messages is rendered through the chat
template turn by turn: what the model reads before a turn is the template's text with the generation prompt, what it
writes runs from there to the first token that ends a turn. Nothing is asked of the template but its text, so a template
without marks for generated text is as good as one with them.

Some templates rewrite what went before (Qwen3's drops the thinking of earlier turns). Then no single sequence holds what
the model reads at every turn, and the conversation becomes several rollouts, each exactly what the model reads and writes.

Left out: images, and a loss on anything that the assistant did not write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from opdkit.config import TaskConfig
from opdkit.errors import DataError
from opdkit.models import LanguageModel
from opdkit.rollouts.rollout import Rollout
from opdkit.tasks.messages import prompt_messages
from opdkit.tasks.problem import Message, Problem, Task, Trace
from opdkit.tasks.prompts import render, token_ids

_SHOWN = 60  # characters of a text in an error message
_NO_CALLS = "the chat template does not render its tool calls; use a model whose template has tools"


@dataclass
class Transcript:
    """A prompt and what follows it, token by token: whether the model writes it, and in which turn."""

    problem: Problem
    text: str  # prompt and response so far
    prompt: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    near: str = ""  # the end of the text, from the last token that ends a turn on, and its ids
    near_ids: list[int] = field(default_factory=list)

    def add(self, tokenizer: PreTrainedTokenizerBase, text: str, trained: bool, turn: int) -> None:
        """Append a text. Its ids are those of the whole text, so that they do not depend on where it was cut."""
        whole, known = token_ids(tokenizer, self.near + text), len(self.near_ids)
        # A tokenizer may join characters across the cut; the model reads the ids before it and writes its own after it.
        new = whole[known:] if whole[:known] == self.near_ids else token_ids(tokenizer, text)
        self.text += text
        self.near += text
        self.near_ids = [*self.near_ids, *new]
        self.ids += new
        self.trained += [trained] * len(new)
        self.turns += [turn] * len(new)

    def end_turn(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start anew behind the token that ended the turn: a tokenizer joins nothing across a special token."""
        end = self.ids[-1]
        text = str(tokenizer.decode([end], skip_special_tokens=False))
        if end in tokenizer.added_tokens_decoder and token_ids(tokenizer, text) == [end]:
            self.near, self.near_ids = text, [end]


def dataset_rollouts(
    lm: LanguageModel, task: Task, problem: Problem, prompt: tuple[int, ...], group: int, eos_ids: Sequence[int], limit: int
) -> list[Rollout]:  # fmt: skip
    """The data set's response to one prompt, cut at `limit` response tokens; several where the template asks for it.

    Raises DataError when there is no response, the template cannot render it, or a later turn's prompt leaves no room.
    """
    response = problem.response
    if response is None:
        response = task.target(problem) if task.target is not None else problem.answer
    if not response:
        raise DataError(
            f"problem {problem.id} has no response to train on; give the data a response or an answer column"
        )
    if isinstance(response, Trace):
        found = [_traced(lm.tokenizer, problem, prompt, response, task.config, eos_ids)]
    elif isinstance(response, str):
        found = [_verbatim(lm.tokenizer, problem, prompt, response, task.config, eos_ids)]
    else:
        found = _conversation(lm.tokenizer, problem, prompt, response, task.config, eos_ids)
    return [_rollout(lm, one, response, group, limit) for one in found]


def _rollout(
    lm: LanguageModel, one: Transcript, response: str | tuple[Message, ...], group: int, limit: int
) -> Rollout:
    cut = len(one.ids) > limit
    ids, trained, turns = (
        tuple(one.ids[:limit]),
        tuple(one.trained[:limit]),
        tuple(turn - one.turns[0] for turn in one.turns[:limit]),
    )
    if len(one.prompt) + len(ids) > lm.context_length:
        raise DataError(
            f"problem {one.problem.id}: {len(one.prompt)} prompt and {len(ids)} response tokens are over the context of "
            f"{lm.name}, {lm.context_length}; shorten the conversation, or lower sampling.max_new_tokens"
        )
    text = response if isinstance(response, str) and not cut else lm.tokenizer.decode(ids, skip_special_tokens=True)
    return Rollout(
        one.problem, one.prompt, ids, text, group, "length" if cut else "stop", source="data",
        trained=None if all(trained) else trained, turns=turns if any(turns) else None,
    )  # fmt: skip


def _verbatim(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    prompt: tuple[int, ...],
    text: str,
    config: TaskConfig,
    eos_ids: Sequence[int],
) -> Transcript:
    ids = token_ids(tokenizer, text)
    if ids[-1:] != [end := turn_end(tokenizer, problem, config, eos_ids)]:
        ids = [*ids, end]
    return Transcript(problem, "", prompt, ids, [True] * len(ids), [0] * len(ids))


def _traced(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    prompt: tuple[int, ...],
    trace: Trace,
    config: TaskConfig,
    eos_ids: Sequence[int],
) -> Transcript:
    found, turn = Transcript(problem, "", prompt), 0
    for text, written in trace.parts:
        turn += written and bool(found.trained) and not found.trained[-1]
        ids = token_ids(tokenizer, text)
        found.ids += ids
        found.trained += [written] * len(ids)
        found.turns += [turn] * len(ids)
    found.ids.append(turn_end(tokenizer, problem, config, eos_ids))
    found.trained.append(True)
    found.turns.append(turn)
    return found


def turn_end(tokenizer: PreTrainedTokenizerBase, problem: Problem, config: TaskConfig, eos_ids: Sequence[int]) -> int:
    """The token that ends a response: the one that the template writes after an answer, else the first of eos_ids.

    A model may have several (Llama 3: end of text, end of turn), and only the template says which one ends a turn.
    """
    if config.template == "plain":
        return eos_ids[0]
    answered = [*prompt_messages(problem, config.system), {"role": "assistant", "content": "answer"}]
    tail = render(tokenizer, problem, answered, config.template_args, generation=False).rpartition("answer")[2]
    found = [(tail.find(text), i) for text, i in _end_texts(tokenizer, eos_ids).items() if text in tail]
    return min(found)[1] if found else eos_ids[0]


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    prompt: tuple[int, ...],
    response: tuple[Message, ...],
    config: TaskConfig,
    eos_ids: Sequence[int],
) -> list[Transcript]:
    if config.template == "plain":
        raise DataError(
            f"problem {problem.id}: its response is messages, which task.template 'plain' cannot render; set chat"
        )
    ends = _end_texts(tokenizer, eos_ids)
    asked = prompt_messages(replace(problem, system=None), None)  # the system prompt stays the problem's
    found: list[Transcript] = []
    turn = 0
    for k, message in enumerate(response):
        if message["role"] != "assistant":
            continue
        before = replace(problem, prompt=(*asked, *response[:k]), response=response[k:]) if k else problem
        messages = prompt_messages(before, config.system)
        read = render(tokenizer, before, messages, config.template_args, generation=True)
        closed = render(tokenizer, before, [*messages, message], config.template_args, generation=False)
        if message.get("tool_calls"):
            bare = [*messages, {**message, "tool_calls": []}]
            if closed == render(tokenizer, before, bare, config.template_args, generation=False):
                raise DataError(f"problem {problem.id}, turn {turn + 1} of the response: {_NO_CALLS}")
        written = _written(before, message, read, closed, ends, turn)
        if found and read.startswith(found[-1].text):
            found[-1].add(tokenizer, read[len(found[-1].text) :], False, turn - 1)
        else:
            new = replace(before, id=f"{problem.id}:turn{turn + 1}") if k else problem
            ids = tuple(token_ids(tokenizer, read)) if k else prompt
            found.append(Transcript(new, read, ids, near=read, near_ids=list(ids)))
        found[-1].add(tokenizer, written, True, turn)
        found[-1].end_turn(tokenizer)
        turn += 1
    return found


def _written(problem: Problem, message: Message, read: str, closed: str, ends: Mapping[str, int], turn: int) -> str:
    """The part of a rendered turn that the model writes. Raises DataError where the template does not give it away."""
    where = f"problem {problem.id}, turn {turn + 1} of the response"
    if not closed.startswith(read):
        same = next(
            (i for i, (a, b) in enumerate(zip(read, closed, strict=False)) if a != b), min(len(read), len(closed))
        )
        raise DataError(
            f"{where}: the chat template asks for an answer after {read[-_SHOWN:]!r}, but renders this turn as "
            f"{closed[same : same + _SHOWN]!r} from character {same} of {len(read)} on. The template drops or adds thinking; "
            "change task.template_args (such as enable_thinking) or the message, or give a response of one turn as text"
        )
    rest = closed[len(read) :]
    places = [rest.find(text) + len(text) for text in ends if text in rest]
    if not places:
        raise DataError(
            f"{where}: the chat template ends it with none of the end tokens {', '.join(ends)}; set sampling.eos_ids to "
            "the token that ends a turn"
        )
    written = rest[: min(places)]
    content = message["content"] if isinstance(message["content"], str) else ""
    if inside := [text for text in ends if text in content]:
        raise DataError(f"{where}: its text contains the end token {inside[0]}; the model would stop there. Remove it")
    return written


def _end_texts(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> dict[str, int]:
    """How the end tokens stand in a rendered text."""
    found = {str(tokenizer.decode([i], skip_special_tokens=False)): i for i in reversed(eos_ids)}
    return {text: i for text, i in found.items() if text}
