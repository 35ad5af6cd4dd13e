"""Dataset responses as rollouts: what the model writes, what stands between its turns, templates that rewrite history.

The templates have the shapes of Qwen3's (thinking, tools, a history without thinking), Llama 3's, Phi's and R1's.
"""

from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdkit.config import TaskConfig
from opdkit.errors import DataError
from opdkit.models import LanguageModel
from opdkit.rollouts.flatten import flatten
from opdkit.tasks.messages import prompt_messages
from opdkit.tasks.problem import Problem, Task
from opdkit.tasks.prompts import encode_prompt, render, token_ids
from opdkit.tasks.turns import dataset_rollouts

SPECIAL = ["<|start|>", "<|end|>", "<|stop|>", "<think>", "</think>"]
LETTERS = "\n" + "".join(map(chr, range(32, 127)))

QWEN = """{%- if tools %}<|start|>system
{{ messages[0].content + '\n' if messages[0].role == 'system' }}{% for tool in tools %}{{ tool.name }} {% endfor %}<|end|>
{% elif messages[0].role == 'system' %}<|start|>system
{{ messages[0].content }}<|end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'assistant' %}
{%- set thought, said = m.content.split('</think>') if '</think>' in m.content else ('', m.content) %}
{%- set thought = thought.split('<think>')[-1].strip('\n') %}<|start|>assistant
{% if loop.index0 > ns.last and (loop.last or thought) %}<think>
{{ thought }}
</think>

{% endif %}{{ said.lstrip('\n') }}{% for c in m.tool_calls or [] %}[{{ c.name }} {{ c.arguments | tojson }}]{% endfor %}<|end|>
{% elif m.role == 'tool' %}<|start|>user
={{ m.content }}<|end|>
{% elif m.role == 'user' %}<|start|>user
{{ m.content }}<|end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
LLAMA = r"""{% for m in messages %}<|start|>{{ m.role }}

{{ m.content | trim }}<|end|>{% endfor %}{{ '<|start|>assistant\n\n' }}"""
PHI = """{% for m in messages %}<|start|>{{ m.role }}
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% else %}<|stop|>{% endif %}"""
R1 = """{% for m in messages %}<|start|>{{ m.role }}:{{ m.content.split('</think>')[-1] }}
{%- if m.role == 'assistant' %}<|stop|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant:<think>
{% endif %}"""


def make_lm(template, eos=("<|end|>",), context=400):
    """A language model without weights; one id per character, per special token, and for two line ends in a row."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "\n\n", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n|."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=SPECIAL, unk_token="?")
    tokenizer.chat_template = template
    ends = SimpleNamespace(eos_token_id=[vocab[text] for text in eos])
    inner = SimpleNamespace(max_position_embeddings=context)
    model = SimpleNamespace(generation_config=ends, config=SimpleNamespace(get_text_config=lambda: inner))
    return LanguageModel("student", "path", model, tokenizer)


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = said("", tool_calls=[{"name": "add", "arguments": {"a": 1}}])
RESULT = {"role": "tool", "content": "3"}


def rollouts(lm, response, limit=300, system=None, tools=None, prompt="hi", **settings):
    """The rollouts of one problem, checked against the template's text of the conversation."""
    config = TaskConfig(kind="file", **settings)
    problem = Problem("p", prompt, response=response, system=system, tools=tools)
    args = (config.template, config.system, config.template_args)
    found = dataset_rollouts(
        lm, Task("t", [], [], config=config), problem, encode_prompt(lm.tokenizer, problem, *args), 7, lm.eos_ids, limit
    )
    for r in found:
        assert r.prompt_ids == encode_prompt(lm.tokenizer, r.problem, *args)
        assert (r.group, r.source, r.problem.tools) == (7, "data", problem.tools)
        assert r.trained is None or len(r.trained) == len(r.response_ids)
        assert r.turns is None or len(r.turns) == len(r.response_ids)
        if isinstance(response, tuple) and r.finish == "stop":
            whole = [*prompt_messages(r.problem, config.system), *r.problem.response]
            if r is not found[-1]:  # up to its own last turn, before what the second rollout begins with
                whole = whole[: len(whole) - len(found[-1].problem.response) - 1]
            text = render(lm.tokenizer, r.problem, whole, config.template_args, generation=False)
            ids = token_ids(lm.tokenizer, text)
            assert [*r.prompt_ids, *r.response_ids] == ids[: len(r.prompt_ids) + len(r.response_ids)]
    return found


def spans(lm, rollout):
    """(written by the model?, turn, text) of every run of response tokens."""
    found = []
    for i, token in enumerate(rollout.response_ids):
        key = (rollout.trained is None or rollout.trained[i], 0 if rollout.turns is None else rollout.turns[i])
        if not found or found[-1][:2] != key:
            found.append((*key, ""))
        found[-1] = (*key, found[-1][2] + lm.tokenizer.decode([token]))
    return found


def prompt(lm, rollout):
    return lm.tokenizer.decode(list(rollout.prompt_ids))


# One sequence


def test_only_what_the_assistant_writes_is_trained_on_and_turns_are_numbered():
    lm = make_lm(PHI)
    (one,) = rollouts(lm, (said("yes"), user("more"), said("no"), said("never")), system="be brief")
    assert prompt(lm, one) == "<|start|>system\nbe brief<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert spans(lm, one) == [
        (True, 0, "yes<|end|>"),  # not the <|stop|> that this template writes behind every conversation
        (False, 0, "\n<|start|>user\nmore<|end|>\n<|start|>assistant\n"),
        (True, 1, "no<|end|>"),
        (False, 1, "\n<|start|>assistant\n"),
        (True, 2, "never<|end|>"),
    ]
    assert (one.finish, one.problem.id) == ("stop", "p")
    step = flatten([one])
    assert lm.tokenizer.decode(step.tokens) == "yes<|end|>no<|end|>never<|end|>"
    assert step.layout.turn.tolist() == [0] * 4 + [1] * 3 + [2] * 6


def test_a_template_that_always_asks_for_an_answer_and_trims():
    lm = make_lm(LLAMA, eos=("<|stop|>", "<|end|>"))
    (one,) = rollouts(lm, (said(" yes "), user("more"), said("no")))
    assert spans(lm, one) == [
        (True, 0, "yes<|end|>"),
        (False, 0, "<|start|>user\n\nmore<|end|><|start|>assistant\n\n"),
        (True, 1, "no<|end|>"),
    ]


def test_tool_calls_are_trained_on_and_tool_output_is_not():
    lm = make_lm(QWEN)
    call = said("<think>\nsum\n</think>\n\n", tool_calls=CALL["tool_calls"])
    tools = ({"name": "add"}, {"name": "sub"})
    (one,) = rollouts(lm, (call, RESULT, said("<think>\nok\n</think>\n\n3")), tools=tools)
    assert prompt(lm, one).startswith("<|start|>system\nadd sub <|end|>\n")
    assert spans(lm, one) == [
        (True, 0, '<think>\nsum\n</think>\n\n[add {"a": 1}]<|end|>'),
        (False, 0, "\n<|start|>user\n=3<|end|>\n<|start|>assistant\n"),
        (True, 1, "<think>\nok\n</think>\n\n3<|end|>"),
    ]
    assert one.text == '\nsum\n\n\n[add {"a": 1}]\nuser\n=3\nassistant\n\nok\n\n\n3'


def test_a_response_without_turns_has_no_masks():
    lm = make_lm(QWEN)
    (one,) = rollouts(lm, (said("yes"),), template_args={"enable_thinking": False})
    assert (one.trained, one.turns) == (None, None)
    assert prompt(lm, one).endswith("<|start|>assistant\n<think>\n\n</think>\n\n")
    assert spans(lm, one) == [(True, 0, "yes<|end|>")]  # the response starts behind the empty think block
    (open_,) = rollouts(lm, (said("yes"),))
    assert spans(lm, open_) == [(True, 0, "<think>\n\n</think>\n\nyes<|end|>")]


def test_a_conversation_is_cut_at_the_limit_of_all_its_response_tokens():
    lm = make_lm(PHI)
    (one,) = rollouts(lm, (said("yes"), user("more"), said("no")), limit=10)
    assert spans(lm, one) == [(True, 0, "yes<|end|>"), (False, 0, "\n<|start|>user")]
    assert (one.finish, len(one.response_ids), one.turns) == ("length", 10, None)
    with pytest.raises(DataError, match=r"p: 21 prompt and 9 response tokens are over the context of student, 29"):
        rollouts(make_lm(PHI, context=29), (said("yes yes!"),))


# A template that rewrites history


def test_turns_that_the_template_rewrites_become_rollouts_of_their_own():
    lm = make_lm(QWEN)
    thought = (said("<think>\na\n</think>\n\nyes"), user("more"), said("<think>\nb\n</think>\n\nno"))
    first, second = rollouts(lm, thought, system="s")
    assert [r.problem.id for r in (first, second)] == ["p", "p:turn2"]
    assert spans(lm, first) == [(True, 0, "<think>\na\n</think>\n\nyes<|end|>")]
    assert prompt(lm, second) == (
        "<|start|>system\ns<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\nyes<|end|>\n"
        "<|start|>user\nmore<|end|>\n<|start|>assistant\n"
    )
    assert spans(lm, second) == [(True, 0, "<think>\nb\n</think>\n\nno<|end|>")]
    assert second.turns is None and second.problem.system == "s"


def test_turns_after_a_rewriting_are_numbered_from_0_again():
    lm = make_lm(QWEN)
    call = said("<think>\nb\n</think>\n\n", tool_calls=CALL["tool_calls"])
    _, second = rollouts(lm, (said("yes"), user("more"), call, RESULT, said("<think>\nc\n</think>\n\nno")))
    assert [(written, turn) for written, turn, _ in spans(lm, second)] == [(True, 0), (False, 0), (True, 1)]


def test_a_tool_call_without_thinking_is_rewritten_too():
    lm = make_lm(QWEN)
    first, second = rollouts(lm, (CALL, RESULT, said("3")), tools=({"name": "add"},))
    assert spans(lm, first) == [(True, 0, '<think>\n\n</think>\n\n[add {"a": 1}]<|end|>')]
    assert prompt(lm, second).endswith(
        'assistant\n[add {"a": 1}]<|end|>\n<|start|>user\n=3<|end|>\n<|start|>assistant\n'
    )


def test_a_later_prompt_that_leaves_no_room_is_an_error():
    turns = (said("yes"), user("x" * 40), said("no"))
    assert len(rollouts(make_lm(QWEN, context=100), turns, limit=40)) == 2
    with pytest.raises(DataError, match=r"problem p:turn2: 85 prompt and 7 response tokens .* student, 88; shorten"):
        rollouts(make_lm(QWEN, context=88), turns)


# Text


def test_text_is_written_as_it_stands_and_ends_as_the_template_ends_a_turn():
    for template, eos, end in (
        (LLAMA, ("<|stop|>", "<|end|>"), "<|end|>"),
        (PHI, ("<|stop|>", "<|end|>"), "<|end|>"),  # the first of the two that it writes
        (R1, ("<|end|>", "<|stop|>"), "<|stop|>"),
        (LLAMA, ("<|stop|>",), "<|stop|>"),  # the template writes none that ends a response
    ):
        lm = make_lm(template, eos)
        (one,) = rollouts(lm, " a</think>b ")
        assert spans(lm, one) == [(True, 0, f" a</think>b {end}")]
        assert (one.text, one.trained) == (" a</think>b ", None)
    lm = make_lm(LLAMA, ("<|stop|>", "<|end|>"))
    assert spans(lm, *rollouts(lm, "a", template="plain")) == [(True, 0, "a<|stop|>")]
    assert spans(lm, *rollouts(lm, "a<|end|>")) == [(True, 0, "a<|end|>")]  # it has its end already
    (cut,) = rollouts(lm, "abc", limit=2)
    assert (spans(lm, cut), cut.text, cut.finish) == ([(True, 0, "ab")], "ab", "length")


def test_the_response_column_comes_before_the_tasks_own_target_and_the_answer():
    lm, problem = make_lm(PHI), Problem("p", "hi", answer="a", response="r")
    task = Task("t", [], [], target=lambda problem: "target")

    def text(task, problem):
        return dataset_rollouts(lm, task, problem, (1,), 0, lm.eos_ids, 50)[0].text

    assert text(task, problem) == "r"
    assert text(task, Problem("p", "hi", answer="a")) == "target"
    assert text(Task("t", [], []), Problem("p", "hi", answer="a")) == "a"
    with pytest.raises(DataError, match="problem p has no response to train on"):
        text(Task("t", [], []), Problem("p", "hi"))


def test_a_token_across_the_cut_does_not_change_what_the_model_reads():
    lm = make_lm(PHI)
    problem = Problem("p", "hi", response=(said("\nyes"),))
    ids = encode_prompt(lm.tokenizer, problem, "chat", None)
    (one,) = dataset_rollouts(lm, Task("t", [], []), problem, ids, 0, lm.eos_ids, 50)
    assert one.prompt_ids == ids and spans(lm, one) == [(True, 0, "\nyes<|end|>")]
    whole = token_ids(lm.tokenizer, lm.tokenizer.decode([*ids, *one.response_ids]))
    assert len(whole) == len(ids) + len(one.response_ids) - 1  # written in one go, two line ends are one token


# Errors


@pytest.mark.parametrize(
    ("template", "response", "settings", "message"),
    [
        (QWEN, (said("<think>\na\n</think>\n\nb"),), {"template_args": {"enable_thinking": False}},
         r"p, turn 1 of the response: .*asks for an answer after .*<think>.*renders this turn as 'a.n</think>"),
        (R1, (said("<think>\na</think>b"),), {}, r"turn 1 .*renders this turn as 'b<\|stop\|>'.* one turn as text"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", (said("a"),), {},
         r"turn 1 .*none of the end tokens <\|end\|>; set sampling.eos_ids"),
        (PHI, (said("a"), user("b"), said("c<|end|>d")), {}, r"turn 2 .*text contains the end token <\|end\|>"),
        (PHI, (CALL, RESULT, said("c")), {}, r"turn 1 .*does not render its tool calls"),
        (PHI, (said("a"),), {"template": "plain"}, r"problem p: its response is messages, .*'plain'"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_rendered_name_the_turn(template, response, settings, message):
    with pytest.raises(DataError, match=message):
        rollouts(make_lm(template, ("<|end|>",) if template != R1 else ("<|stop|>",)), response, **settings)
