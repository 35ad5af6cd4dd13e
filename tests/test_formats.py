"""Known layouts of data sets, conversations in columns, and converting between layouts."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.config import TaskConfig
from opdkit.errors import DataError, RecipeError
from opdkit.rewards.answers import verify_math
from opdkit.tasks.convert import convert
from opdkit.tasks.files import read_problems
from opdkit.tasks.formats import after_hashes
from opdkit.tasks.load import check_settings, load_task
from opdkit.tasks.problem import Problem

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, layout="columns", **columns):
    return read_problems(path, TaskConfig(kind="file", path=str(path), format=layout, columns=columns))


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def verl_row(question, answer, index, source="math_dapo"):
    return {
        "data_source": source,
        "prompt": [user(question)],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


# Layouts


def test_verl(tmp_path):
    rows = [verl_row("1+1?", "2", 0), verl_row("2+2?", "4", 1), verl_row("1+1?", "2", 0, "aime")]
    assert read(parquet(tmp_path / "v.parquet", rows), "verl") == [
        Problem(id="0", prompt=(user("1+1?"),), answer="2", domain="math_dapo"),
        Problem(id="1", prompt=(user("2+2?"),), answer="4", domain="math_dapo"),
        Problem(id="0@3", prompt=(user("1+1?"),), answer="2", domain="aime"),  # an index counts from 0 in every source
    ]


def test_dapo_counts_every_prompt_once(tmp_path, caplog):
    rows = [verl_row(f"q{i % 5}", str(i % 5), f"id{i % 5}") for i in range(3000)]  # more than one batch of the reader
    path = parquet(tmp_path / "d.parquet", rows)
    task = load_task(TaskConfig(kind="file", path=str(path), format="dapo", eval_size=2))
    assert sorted(p.id for p in [*task.train, *task.eval]) == ["id0", "id1", "id2", "id3", "id4"]
    assert (len(task.eval), task.verify) == (2, verify_math)
    assert "d.parquet: 5 prompts; 2995 rows that repeat one are left out" in caplog.text
    kept = load_task(TaskConfig(kind="file", path=str(path), format="verl", eval_size=2))
    assert len(kept.train) == 1800 and not {p.prompt[0]["content"] for p in kept.train} & {
        p.prompt[0]["content"] for p in kept.eval
    }


def test_deepmath(tmp_path):
    row = {
        "question": "Find x.",
        "final_answer": "\\frac{1}{2}",
        "difficulty": 6.0,
        "topic": "Algebra",
        "r1_solution_1": "r",
    }
    (one,) = read(parquet(tmp_path / "m.parquet", [row]), "deepmath")
    assert one == Problem("m.parquet:1", "Find x.", "\\frac{1}{2}", "Algebra", metadata={"difficulty": 6.0})
    (other,) = read(tmp_path / "m.parquet", "deepmath", response="r1_solution_1", id="topic")
    assert (other.response, other.id, other.answer) == ("r", "Algebra", "\\frac{1}{2}")


def test_openthoughts3(tmp_path):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "<think>\nhm\n</think>\n\nSo."}]
    rows = [
        {"difficulty": 7, "source": "a", "domain": "math", "conversations": turns},
        {"difficulty": None, "source": "b", "domain": "code", "conversations": [*turns, *turns]},
        {"difficulty": 1, "source": "c", "domain": "code", "conversations": [{"from": "system", "value": "s"}, *turns]},
    ]
    one, two, three = read(parquet(tmp_path / "o.parquet", rows), "openthoughts3")
    written = "<think>\nhm\n</think>\n\nSo."
    meta = {"difficulty": 7, "source": "a"}
    assert one == Problem("o.parquet:1", "Why?", domain="math", response=written, metadata=meta)
    assert two.prompt == (user("Why?"), said(written), user("Why?")) and two.response == written
    assert three.prompt == ({"role": "system", "content": "s"}, user("Why?")) and two.metadata == {"source": "b"}
    task = load_task(TaskConfig(kind="file", path=str(tmp_path / "o.parquet"), format="openthoughts3", eval_size=1))
    assert task.verify is None


def test_gsm8k(tmp_path):
    solution = "She has 2*600=<<2*600=1200>>1200.\n#### 1,200"
    path = jsonl(tmp_path / "g.jsonl", [{"question": "How many?", "answer": solution}])
    assert read(path, "gsm8k") == [Problem("g.jsonl:1", "How many?", "1200", response=solution)]
    assert (after_hashes("#### 3 #### -5.5 "), after_hashes("x\n####0")) == ("-5.5", "0")


def test_gsm8k_from_a_data_set(tmp_path):
    import datasets

    rows = [{"question": f"q{i}", "answer": f"so {i}\n#### {i}"} for i in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    task = load_task(TaskConfig(kind="dataset", path=str(tmp_path / "saved"), format="gsm8k", eval_size=1))
    found = {p.prompt: (p.answer, p.response) for p in [*task.train, *task.eval]}
    assert found == {f"q{i}": (str(i), f"so {i}\n#### {i}") for i in range(4)} and task.config.format == "gsm8k"


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("deepmath", {"question": "q", "answer": "1"}, r"x.jsonl is not in the layout 'deepmath': it has no column "
         r"'final_answer' \(its columns: question, answer\); set another task.format, or .* task.columns .* answer"),
        ("verl", {"question": "q"}, r"no column 'prompt', 'reward_model.ground_truth'"),
        ("openthoughts3", {"messages": []}, r"no column 'conversations', 'conversations'"),
        ("gsm8k", {"question": "q", "answer": "42"}, r"row 1: 'answer' \(answer\) is str '42', expected .* '#### ANSWER'"),
        ("verl", {"prompt": "q", "reward_model": {"style": "x"}}, r"row 1: 'reward_model.ground_truth' \(answer\) is missing"),
        ("openthoughts3", {"conversations": [{"from": "human", "value": "q"}]}, r"\(prompt\) is list .* at least two"),
        ("openthoughts3", {"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]},
         r"has turn 2 = dict .*'bot'.*, expected turns"),
        ("openthoughts3", {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
         r"ends with a turn from 'human', expected one from gpt"),
    ],
)  # fmt: skip
def test_a_file_in_another_layout(tmp_path, layout, row, message):
    with pytest.raises(DataError, match=message):
        read(jsonl(tmp_path / "x.jsonl", [row]), layout)


def test_columns_replace_single_columns_of_a_layout(tmp_path):
    row = {"question": "q", "final": 7, "answer": "text\n#### 8"}
    path = jsonl(tmp_path / "x.jsonl", [row])
    (one,) = read(path, "gsm8k", answer="final")
    assert (one.answer, one.response) == ("7", "text\n#### 8")  # a column given by hand is read as it stands
    with pytest.raises(DataError, match=r"no column 'fnal' \(task.columns.answer\): did you mean 'final'"):
        read(path, "gsm8k", answer="fnal")


@pytest.mark.parametrize("kind", ["testbed", "reasoning_gym"])
def test_a_format_for_generated_tasks_has_no_effect(kind):
    with pytest.raises(RecipeError, match=r"task.format = 'verl' has no effect with task.kind"):
        check_settings(TaskConfig(kind=kind, name="x", format="verl"))


# Conversations in columns


def test_the_assistants_turns_at_the_end_of_a_prompt_are_the_response(tmp_path):
    call = said("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}])
    result = {"role": "tool", "content": "3"}
    rows = [
        {"messages": [user("a"), said("b"), user("c"), said("d")]},
        {"messages": [user("a"), {**call, "content": None}, result, said("3")], "tools": json.dumps([TOOL])},
        {"messages": [user("a"), call, result]},
    ]
    one, two, three = read(jsonl(tmp_path / "m.jsonl", rows), prompt="messages")
    assert (one.prompt, one.response) == ((user("a"), said("b"), user("c")), (said("d"),))
    assert (two.prompt, two.response, two.tools) == ((user("a"),), (call, result, said("3")), (TOOL,))
    assert (three.prompt, three.response) == ((user("a"), call, result), None)


def test_parquet_gives_messages_and_tools_without_the_keys_that_others_have(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    row = {"prompt": "q", "response": [said("", tool_calls=calls), {"role": "tool", "content": "x"}, said("y")],
           "tools": [{"name": "f"}, {"name": "g", "parameters": {"type": "object"}}]}  # fmt: skip
    (one,) = read(parquet(tmp_path / "t.parquet", [row, row]))[:1]
    assert one.response == tuple(row["response"]) and one.tools == tuple(row["tools"])


def test_a_response_as_text(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"prompt": "q", "response": "<think>x</think>y", "answer": "y", "tools": []}])
    assert read(path) == [Problem("r.jsonl:1", "q", "y", response="<think>x</think>y")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [said("a")]}, r"ends with an assistant message and has no message before it"),
        ({"prompt": [user("a"), said("b")], "response": "c"}, r"the row has a response column; keep one"),
        ({"prompt": "q", "response": [user("a"), said("b")]}, r"'response' \(response\) begins with .* role 'user'"),
        ({"prompt": "q", "response": [said("b"), user("a")]}, r"ends with a message of role 'user'"),
        ({"prompt": "q", "response": 5}, r"'response' \(response\) is int 5, expected a string or a list"),
        ({"prompt": "q", "response": [{"role": "assistant"}]}, r"message 1 is dict .*role and content"),
        ({"prompt": [{"role": "user", "content": None}]}, r"message 1 has no content \(null\)"),
        ({"prompt": "q", "tools": "[{"}, r"'tools' \(tools\) is not valid JSON"),
        ({"prompt": "q", "tools": {"name": "f"}}, r"is dict .*, expected a list of JSON schemas"),
        ({"prompt": "q", "tools": [{"type": "function"}]}, r"tool 1 is dict .*with its name"),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(jsonl(tmp_path / "x.jsonl", [row]))


# Converting


def test_convert_from_verl_and_back(tmp_path):
    rows = [verl_row("1+1?", "2", "a"), verl_row("2+2?", "4", "b", "aime")]
    source = parquet(tmp_path / "v.parquet", rows)
    shown = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "c.jsonl"), "--format", "verl"])
    assert shown.stdout.split("\n")[:2] == [
        f"2 rows of '{source}' (verl) as '{tmp_path / 'c.jsonl'}' (columns)",
        "  answer: 2, response: 0, tools: 0, domains: 2",
    ]
    first = json.loads((tmp_path / "c.jsonl").read_text().split("\n")[0])
    assert first == {"id": "a", "prompt": [user("1+1?")], "answer": "2", "domain": "math_dapo"}
    assert read(tmp_path / "c.jsonl") == read(source, "verl")
    convert(tmp_path / "c.jsonl", tmp_path / "back.parquet", write_as="verl")
    assert read(tmp_path / "back.parquet", "verl") == read(source, "verl")
    written = pyarrow.parquet.read_table(tmp_path / "back.parquet").to_pylist()[0]
    assert written == {"data_source": "math_dapo", "prompt": [user("1+1?")], "extra_info": {"index": "a"},
                       "reward_model": {"style": "rule", "ground_truth": "2"}}  # fmt: skip


def test_convert_keeps_responses_tools_and_system_prompts(tmp_path):
    rows = [
        {"prompt": "q", "response": [said("a"), user("b"), said("c")], "tools": [TOOL], "system": "s", "answer": "7"},
        {"prompt": [user("p")], "response": "text", "answer": "8", "domain": "d", "id": "x"},
    ]
    source = jsonl(tmp_path / "in.jsonl", rows)
    convert(source, tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == read(source)
    lines = convert(source, tmp_path / "out.parquet", write_as="verl").split("\n")
    assert lines[-1] == "  left out, since verl's layout has no place for them: 2 response, 1 tools"
    first = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert first["prompt"] == [{"role": "system", "content": "s"}, user("q")]
    with pytest.raises(DataError, match=r"rows do not fit into parquet, .* write .jsonl"):
        convert(source, tmp_path / "mixed.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.parquet"]  # no leftovers


def test_convert_refuses(tmp_path):
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "q"}])
    (tmp_path / "there.jsonl").write_text("mine")
    for target, options, message in (
        ("there.jsonl", {}, r"there.jsonl' exists; nothing is overwritten"),
        ("in.csv", {}, r"suffix '.csv', expected .jsonl or .parquet"),
        ("no/out.jsonl", {}, r"no' is not a folder"),
        ("out.jsonl", {"write_as": "verl"}, r"problem in.jsonl:1 has no answer"),
        ("out.jsonl", {"read_as": "deepmath"}, r"not in the layout 'deepmath'"),
        ("out.jsonl", {"read_as": "verll"}, r"no layout 'verll': did you mean 'verl'"),
        ("out.jsonl", {"write_as": "gsm8k"}, r"no layout 'gsm8k'; known: columns, verl"),
    ):
        with pytest.raises((DataError, RecipeError), match=message):
            convert(source, tmp_path / target, **options)
    assert (tmp_path / "there.jsonl").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
