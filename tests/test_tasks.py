"""Tasks: files, data sets, reasoning-gym, the split into training and held-out prompts, and prompt encoding."""

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opdkit.config import TaskConfig, dump_recipe, parse_recipe
from opdkit.errors import DataError, ModelError, RecipeError
from opdkit.rewards.answers import verify_exact, verify_math
from opdkit.rewards.worker import gym_scorer
from opdkit.tasks.gym import extract_answer
from opdkit.tasks.load import check_settings, load_task
from opdkit.tasks.problem import Problem, Task, Verdict
from opdkit.tasks.prompts import encode_problems, encode_prompt

WORDS = ["[UNK]", "<bos>", "<eos>", "<system>", "<user>", "<assistant>", "a", "b", "c", "d"]
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
ONE = {"prompt": "a", "answer": 1}
THREE = [{"prompt": f"q{i}"} for i in range(3)]
SYSTEM_TWICE = {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "system": "y"}


def tokenizer(chat=CHAT, closes=False):
    """One id per word; `closes`: adds <bos> and <eos> to every text."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closes:
        inner.post_processor = processors.TemplateProcessing(
            "<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = chat
    return made


def write(path, rows):
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(tmp_path, count=10, name="data.jsonl"):
    return write(tmp_path / name, [{"prompt": f"what is {i}", "answer": i} for i in range(count)])


def config(kind="file", **settings):
    return TaskConfig(kind=kind, **settings)


# Files


def test_a_jsonl_file_becomes_problems_with_all_columns(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [
        {"prompt": "p", "answer": 3, "domain": "d", "system": "y", "id": "one"},
        "",
        {"prompt": messages, "answer": "4"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    eval_path = write(tmp_path / "eval.jsonl", [{"prompt": "e", "answer": "5"}])
    task = load_task(config(path=path, eval_path=eval_path))
    assert task.name == "data"
    assert task.train[0] == Problem(id="one", prompt="p", answer="3", domain="d", system="y")
    assert task.train[1] == Problem(id="data.jsonl:3", prompt=tuple(messages), answer="4")
    assert [problem.id for problem in task.eval] == ["eval.jsonl:1"]
    assert task.verify is verify_math


def test_parquet_with_nested_columns_as_verl_writes_them(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}", "name": None}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
        }
        for i in range(3)
    ]
    rows[2]["prompt"][0]["name"] = "ann"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    task = load_task(
        config(path=str(tmp_path / "d.parquet"), eval_size=1, columns={"answer": "reward_model.ground_truth"})
    )
    problems = {problem.id: problem for problem in [*task.train, *task.eval]}
    assert {id: problem.answer for id, problem in problems.items()} == {f"d.parquet:{i + 1}": str(i) for i in range(3)}
    assert problems["d.parquet:1"].prompt == ({"role": "user", "content": "q0"},)
    assert problems["d.parquet:3"].prompt == ({"role": "user", "content": "q2", "name": "ann"},)


def test_hold_out_is_seeded_and_shares_no_prompt(tmp_path):
    rows = [{"prompt": f"q{i % 6}", "answer": i} for i in range(18)]  # six prompts, three rows each
    path = write(tmp_path / "d.jsonl", rows)
    task = load_task(config(path=path, eval_size=2, seed=3))
    again = load_task(config(path=path, eval_size=2, seed=3))
    held = {problem.prompt for problem in task.eval}
    assert len(task.eval) == len(held) == 2
    assert len(task.train) == 12 and not held & {problem.prompt for problem in task.train}
    assert (list(task.train), list(task.eval)) == (list(again.train), list(again.eval))
    others = [{problem.prompt for problem in load_task(config(path=path, eval_size=2, seed=s)).eval} for s in range(5)]
    assert any(other != held for other in others)


def test_prompts_of_the_evaluation_file_leave_training(tmp_path, caplog):
    path = numbered(tmp_path, 10)
    eval_path = numbered(tmp_path, 3, "eval.jsonl")
    task = load_task(config(path=path, eval_path=eval_path))
    assert [problem.answer for problem in task.train] == [str(i) for i in range(3, 10)]
    assert "3 of 10 prompts of data.jsonl also occur in eval.jsonl: not trained on" in caplog.text
    smaller = load_task(config(path=path, eval_path=eval_path, eval_size=2))
    assert len(smaller.eval) == 2 and list(smaller.train) == list(task.train)


def test_train_size_takes_a_seeded_choice_in_order(tmp_path):
    task = load_task(config(path=numbered(tmp_path, 30), eval_size=5, train_size=8))
    answers = [int(problem.answer) for problem in task.train]
    assert len(answers) == 8 and answers == sorted(answers) and answers != list(range(8))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (['{"prompt": "a"}', '{"prompt": '], {}, r"bad\.jsonl:2 is not valid JSON"),
        (["[1]"], {}, r"bad\.jsonl:1 holds list, expected one JSON object"),
        ([], {}, r"bad\.jsonl has no rows: an empty data set"),
        ([{"question": "q", "n": 1}], {}, r"no column 'prompt' \(its columns: question, n\).*\{prompt: question\}"),
        ([{"promt": "q"}], {"columns": {"prompt": "promtp"}}, r"no column 'promtp'.*did you mean 'promt'"),
        ([{"prompt": "q"}], {"columns": {"answr": "x"}}, r"unknown column 'answr': did you mean 'answer'"),
        ([{"prompt": "q"}, {"prompt": 5}], {}, r"row 2: 'prompt' \(prompt\) is int 5, expected a string or a list"),
        ([{"prompt": "q"}, {"x": 5}], {}, r"row 2: 'prompt' \(prompt\) is missing"),
        ([{"prompt": " "}], {}, r"row 1: 'prompt' \(prompt\) is empty"),
        ([{"prompt": []}], {}, r"row 1: 'prompt' \(prompt\) is list \[\]"),
        ([{"prompt": ["hi"]}], {}, r"message 1 is str 'hi', expected a mapping with role and content"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], {}, r"row 1.*ends with an assistant message and has no"),
        ([{"prompt": "q", "answer": [1]}], {}, r"row 1: 'answer' \(answer\) is list \[1\], expected a string"),
        ([{"prompt": "q", "domain": True}], {}, r"'domain' \(domain\) is bool True"),
        ([SYSTEM_TWICE], {}, "keep one"),
        (THREE, {"eval_size": 3}, r"3 rows with 3 distinct prompts.*lower task\.eval_size"),
        ([{"prompt": "same"}] * 9, {"eval_size": 1}, r"9 rows with 1 distinct prompts"),
        (THREE, {"eval_size": 1, "train_size": 5}, r"task\.train_size = 5.* 2 training rows"),
        (THREE, {"eval_size": 1, "verifier": "math"}, r"3 of 3 problems have no answer"),
        (THREE, {"eval_size": 1, "verifier": "exact"}, r"3 of 3 problems have no answer"),
        ([ONE, {"prompt": "b"}], {"eval_size": 1}, r"1 of 2 .* no answer \(first: bad.jsonl:2\)"),
        ([ONE, {"prompt": "b", "answer": "Oslo"}], {"eval_size": 1}, r"bad.jsonl:2: the answer 'Oslo'"),
    ],
)  # fmt: skip
def test_bad_rows_get_one_clear_error(tmp_path, rows, settings, message):
    with pytest.raises((DataError, RecipeError), match=message):
        load_task(config(path=write(tmp_path / "bad.jsonl", rows), **settings))


def test_bad_paths_get_one_clear_error(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "no.parquet").write_text("not parquet")
    cases = {
        "none.jsonl": "does not exist",
        "folder.jsonl": "is a folder",
        "data.csv": r"suffix '.csv', expected .jsonl",
        "latin.jsonl": r"not UTF-8 text \(byte 12\)",
        "no.parquet": "cannot be read as parquet",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            load_task(config(path=str(tmp_path / name)))


def test_an_evaluation_file_that_is_too_small_or_takes_everything(tmp_path):
    path, eval_path = numbered(tmp_path, 3), numbered(tmp_path, 3, "eval.jsonl")
    with pytest.raises(DataError, match=r"every prompt of data.jsonl also occurs in eval.jsonl"):
        load_task(config(path=path, eval_path=eval_path))
    with pytest.raises(DataError, match=r"task.eval_size = 4, but eval.jsonl has 3 rows"):
        load_task(config(path=numbered(tmp_path, 9), eval_path=eval_path, eval_size=4))


# Settings and verifiers


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "file", "path": "x", "split": "test"}, "split"),
        ({"kind": "file", "path": "x", "settings": {"a": 1}}, "settings"),
        ({"kind": "file", "path": "x", "name": "n"}, "name"),
        ({"kind": "dataset", "path": "x", "eval_path": "y"}, "eval_path"),
        ({"kind": "testbed", "name": "x", "columns": {"prompt": "q"}}, "columns"),
        ({"kind": "reasoning_gym", "name": "chain_sum", "eval_split": "test"}, "eval_split"),
        ({"kind": "file", "path": "x", "template": "plain", "system": "s"}, "system"),
        ({"kind": "file", "path": "x", "template": "plain", "template_args": {"a": 1}}, "template_args"),
    ],
)
def test_a_setting_without_effect_is_an_error(settings, name):
    with pytest.raises(RecipeError, match=rf"task\.{name} .*no effect"):
        check_settings(TaskConfig(**settings))


def test_a_recipe_written_out_with_its_defaults_loads_again():
    recipe = parse_recipe({"method": {"name": "opd"}, "student": {"path": "s"}, "task": {"kind": "file", "path": "x"}})
    import yaml

    check_settings(parse_recipe(yaml.safe_load(dump_recipe(recipe))).task)


def test_a_missing_path_or_name_is_named():
    with pytest.raises(RecipeError, match=r"kind 'file' needs task\.path"):
        load_task(config())
    with pytest.raises(RecipeError, match=r"kind 'testbed' needs task\.name"):
        load_task(config(kind="testbed"))


def test_the_verifier_follows_the_answers_and_the_recipe(tmp_path):
    path = numbered(tmp_path)
    assert load_task(config(path=path, eval_size=2)).verify is verify_math
    assert load_task(config(path=path, eval_size=2, verifier="exact")).verify is verify_exact
    assert load_task(config(path=path, eval_size=2, verifier="none")).verify is None
    bare = write(tmp_path / "bare.jsonl", [{"prompt": f"q{i}"} for i in range(4)])
    assert load_task(config(path=bare, eval_size=2)).verify is None


def test_testbed_tasks_keep_their_own_verifier(monkeypatch):
    own = lambda problem, text: Verdict(1.0, True)  # noqa: E731
    module = types.ModuleType("opdkit.testbed.tasks")
    module.testbed_task = lambda config: Task(
        config.name, [Problem("1", "p", "7")], [Problem("2", "q", "8")], verify=own
    )
    monkeypatch.setitem(sys.modules, "opdkit.testbed.tasks", module)
    assert load_task(config(kind="testbed", name="toy")).verify is own
    assert load_task(config(kind="testbed", name="toy", verifier="exact")).verify is verify_exact


# Data sets


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_a_local_folder_and_a_saved_data_set_give_the_same_problems(tmp_path, hf_cache):
    import datasets

    (tmp_path / "folder").mkdir()
    for split, first in (("train", 0), ("test", 6)):
        write(
            tmp_path / "folder" / f"{split}.jsonl",
            [{"question": f"q{first + i}", "extra": {"gold": i}} for i in range(8)],
        )
    columns = {"prompt": "question", "answer": "extra.gold"}
    loaded = load_task(config("dataset", path=str(tmp_path / "folder"), eval_split="test", columns=columns))
    assert [problem.prompt for problem in loaded.train] == [f"q{i}" for i in range(6)]  # q6 and q7 are in test
    assert [(problem.id, problem.answer) for problem in loaded.eval[:2]] == [
        ("folder[test]:1", "0"),
        ("folder[test]:2", "1"),
    ]
    datasets.load_dataset(str(tmp_path / "folder")).save_to_disk(str(tmp_path / "saved"))
    saved = load_task(config("dataset", path=str(tmp_path / "saved"), eval_split="test", columns=columns))
    assert [problem.prompt for problem in saved.train] == [problem.prompt for problem in loaded.train]
    with pytest.raises(DataError, match=r"no split 'dev'; its splits: train, test"):
        load_task(config("dataset", path=str(tmp_path / "saved"), split="dev", columns=columns))
    with pytest.raises(RecipeError, match=r"task\.name 'x' has no effect"):
        load_task(config("dataset", path=str(tmp_path / "saved"), name="x"))
    with pytest.raises(DataError, match=r"split 'dev'\) cannot be loaded"):
        load_task(config("dataset", path=str(tmp_path / "folder"), split="dev", columns=columns))


def test_a_saved_table_holds_rows_out_and_has_no_splits(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"prompt": f"q{i}"} for i in range(5)]).save_to_disk(str(tmp_path / "one"))
    task = load_task(config("dataset", path=str(tmp_path / "one"), eval_size=2))
    assert (len(task.train), len(task.eval), task.verify) == (3, 2, None)
    with pytest.raises(DataError, match="one table without splits"):
        load_task(config("dataset", path=str(tmp_path / "one"), split="test", eval_size=2))


def test_a_data_set_that_does_not_exist(tmp_path, hf_cache):
    with pytest.raises(DataError, match=r"data set '.*nowhere' .* cannot be loaded"):
        load_task(config("dataset", path=str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match=r"eval_split is 'train', the training split"):
        write(tmp_path / "train.jsonl", [{"prompt": "q"}])
        load_task(config("dataset", path=str(tmp_path), eval_split="train"))


# reasoning-gym


def gym(**settings):
    return load_task(config("reasoning_gym", name="chain_sum", **settings))


def test_reasoning_gym_is_lazy_deterministic_and_disjoint():
    easy = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 prompts in all: they must collide
    task, again = gym(train_size=500, eval_size=60, settings=easy), gym(train_size=500, eval_size=60, settings=easy)
    held = {problem.prompt for problem in task.eval}
    assert len(held) == len(task.eval) == 60 and len(task.train) == 500
    assert not held & {problem.prompt for problem in task.train}
    assert task.train[-1] == again.train[499] and task.train[3:5] == [again.train[3], again.train[4]]
    assert task.train[7].domain == "chain_sum" and task.train[7].id == "chain_sum:train:7"
    assert task.train[7].prompt != gym(train_size=500, eval_size=60, settings=easy, seed=1).train[7].prompt
    assert len(gym(eval_size=1).train) == 10_000
    with pytest.raises(IndexError):
        task.train[500]


def test_reasoning_gym_scores_with_its_own_scorer():
    task = gym(eval_size=2)
    problem = task.eval[0]
    assert task.verify(problem, f"Well.\nAnswer: {int(problem.answer):,}.00") == Verdict(
        1.0, True
    )  # its tolerance, not ours
    assert task.verify(problem, f"it is <answer>{problem.answer}</answer>") == Verdict(1.0, True)
    partial = task.verify(problem, problem.answer + "x" * len(problem.answer))
    assert partial == Verdict(0.5, False)
    assert task.verify(problem, "") == Verdict(0.0, False)


def test_an_answer_that_a_scorer_cannot_read_scores_zero():
    problem = load_task(config("reasoning_gym", name="prime_factorization", train_size=2, eval_size=2)).eval[0]
    entry = {"question": problem.prompt, "answer": problem.answer, "metadata": problem.metadata}
    score = gym_scorer("prime_factorization", {"seed": 0, "size": 1})
    assert score("[", entry) == 0.0  # reasoning-gym raises ValueError here
    assert score(problem.answer, entry) == 1.0


def test_reasoning_gym_with_another_verifier():
    assert gym(eval_size=2, verifier="math").verify is verify_math
    with pytest.raises(DataError, match=r"2 of 2 problems have no answer"):
        load_task(config("reasoning_gym", name="graph_color", eval_size=2, verifier="exact"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "chain_sums"}, r"no task 'chain_sums': did you mean 'chain_sum'"),
        ({"name": "composite"}, r"no task 'composite'"),
        ({"name": "chain_sum", "settings": {"max_term": 3}}, r"no setting 'max_term': did you mean 'max_terms'"),
        ({"name": "chain_sum", "settings": {"size": 3}}, r"use task\.seed, task\.train_size and task\.eval_size"),
        (
            {"name": "chain_sum", "settings": {"min_terms": 9}},
            r"refuses task\.settings .*max_terms must be >= min_terms",
        ),
        ({"name": "chain_sum", "settings": {"min_terms": "two"}}, r"refuses task\.settings"),
        ({"name": "coin_flip", "eval_size": 1000, "settings": {"max_trials": 3}}, r"distinct prompts in 4100 draws"),
    ],
)
def test_reasoning_gym_says_what_is_wrong(settings, message):
    with pytest.raises((RecipeError, DataError), match=message):
        load_task(config("reasoning_gym", **settings))


def test_evaluation_that_takes_nearly_every_prompt_fails_at_the_start():
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match=r"of the first 16 training prompts are held out"):
        gym(eval_size=190, settings=tiny)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  12 \n", "12"),
        ("Answer: 3\nno, answer: 4 ", "4"),
        ("**Answer:** 5", "5"),
        ("<answer>1</answer> then <answer>\n2\n3</answer> bye", "2\n3"),
        ("Answer: 1 <answer>2</answer>", "2"),
        ("<answer>2</answer> Answer: 1", "1"),
        ("<answer>7", "7"),
    ],
)
def test_answer_extraction(text, answer):
    assert extract_answer(text) == answer


# Prompts


def ids(text):
    return tuple(WORDS.index(word) for word in text.split())


def test_chat_and_plain_prompts():
    chat, plain = tokenizer(), tokenizer(chat=None, closes=True)
    messages = ({"role": "system", "content": "b"}, {"role": "user", "content": "a"})
    assert encode_prompt(chat, Problem("1", "a b"), "chat", None) == ids("<user> a b <assistant>")
    assert encode_prompt(chat, Problem("1", "a"), "chat", "c") == ids("<system> c <user> a <assistant>")
    assert encode_prompt(chat, Problem("1", "a", system="d"), "chat", "c") == ids("<system> d <user> a <assistant>")
    assert encode_prompt(chat, Problem("1", messages), "chat", "c") == ids("<system> b <user> a <assistant>")
    assert encode_prompt(plain, Problem("1", "a b"), "plain", None) == ids("<bos> a b")  # <eos> does not end a prompt
    assert encode_prompt(chat, Problem("1", "a b"), "plain", None) == ids("a b")


def test_prompts_that_cannot_be_encoded():
    refuses = tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    messages = ({"role": "user", "content": "a"},)
    with pytest.raises(ModelError, match=r"no chat template; set task\.template: plain"):
        encode_prompt(tokenizer(chat=None), Problem("p3", "a"), "chat", None)
    for case in [
        (tokenizer(), Problem("p3", " "), "chat", None, "problem p3 is empty"),
        (tokenizer(), Problem("p3", messages), "plain", None, "problem p3 is a list of messages"),
        (tokenizer(), Problem("p3", "a", system="s"), "plain", None, "p3 has a system prompt"),
        (
            refuses,
            Problem("p3", "a"),
            "chat",
            "s",
            "refuses the messages of problem p3 .*no system role.*roles: system, user",
        ),
        (refuses, Problem("p3", "a"), "chat", None, "problem p3 has no tokens"),
    ]:
        with pytest.raises(DataError, match=case[-1]):
            encode_prompt(*case[:-1])


THINKING = CHAT + "{% if add_generation_prompt and not enable_thinking | default(true) %} a b{% endif %}"
TOOLS = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + CHAT


def test_template_arguments_reach_the_template():
    made = tokenizer(THINKING)
    assert encode_prompt(made, Problem("1", "c"), "chat", None) == ids("<user> c <assistant>")
    closed = ids("<user> c <assistant> a b")
    assert encode_prompt(made, Problem("1", "c"), "chat", None, {"enable_thinking": False}) == closed
    task = config(path="x", template_args={"enable_thinking": False})
    assert encode_problems([Problem("1", "c")], made, task, 20, 4)[0][1] == closed


@pytest.mark.parametrize(
    ("chat", "args", "message"),
    [
        (
            CHAT,
            {"enable_thinking": False},
            r"task.template_args.enable_thinking = False has no effect: the chat template",
        ),
        (THINKING, {"enable_thinkng": False}, r"task.template_args.enable_thinkng = False has no effect"),
        (THINKING, {"enable_thinking": "true"}, r"task.template_args.enable_thinking = 'true' has no effect"),
        (THINKING, {"enable_thinking": False, "other": 1}, r"task.template_args.other = 1 has no effect"),
        (TOOLS, {"tools": []}, r"task.template_args.tools cannot be set: it comes from the data"),
    ],
)
def test_a_template_argument_without_effect_is_an_error(chat, args, message):
    with pytest.raises(RecipeError, match=message):
        encode_problems([Problem("1", "c")], tokenizer(chat), config(path="x", template_args=args), 20, 4)


def test_a_default_may_be_spelled_out_and_an_argument_may_concern_the_history():
    spelled = config(path="x", template_args={"enable_thinking": True})
    assert encode_problems([Problem("1", "c")], tokenizer(THINKING), spelled, 20, 4)[0][1] == ids(
        "<user> c <assistant>"
    )
    history = "{% if keep and messages[-1].role == 'assistant' %}d{% endif %}" + CHAT
    written = Problem("1", "c", response=({"role": "assistant", "content": "a"},))
    kept = config(path="x", template_args={"keep": "all"})
    assert len(encode_problems([written], tokenizer(history), kept, 20, 4)) == 1
    with pytest.raises(RecipeError, match=r"task.template_args.keep = 'all' has no effect"):
        encode_problems([Problem("1", "c")], tokenizer(history), kept, 20, 4)


def test_tools_reach_the_template_or_are_an_error():
    asked = Problem("t", "c", tools=({"name": "a"}, {"name": "b"}))
    problems = [Problem(str(i), "c") for i in range(40)]
    encoded = encode_problems([*problems, asked], tokenizer(TOOLS), config(path="x"), 20, 4)
    assert (encoded[0][1], encoded[-1][1]) == (ids("<user> c <assistant>"), ids("a b <user> c <assistant>"))
    with pytest.raises(DataError, match=r"does not show the tools of problem t"):
        encode_problems([*problems, asked], tokenizer(), config(path="x"), 20, 4)
    with pytest.raises(DataError, match=r"problem t has tools, which task.template 'plain' would ignore"):
        encode_problems([asked], tokenizer(), config(path="x", template="plain"), 20, 4)


def encode(problems, *, context_length=20, max_new_tokens=4, **settings):
    task = config(path="x", template="plain", **settings)
    return encode_problems(problems, tokenizer(), task, context_length, max_new_tokens)


SHORT, LONG = Problem("short", "a b"), Problem("long", "a b c d a b")


def test_encoded_problems_are_a_sequence():
    encoded = encode([SHORT, LONG])
    assert list(encoded) == [(SHORT, ids("a b")), (LONG, ids("a b c d a b"))]
    assert (len(encoded), encoded.dropped, encoded[-1:], encoded[0][1]) == (2, 0, [encoded[1]], ids("a b"))


def test_overlong_prompts_stop_the_run_or_are_dropped_and_counted():
    with pytest.raises(
        DataError, match=r"problem long has 6 tokens, task.max_prompt_tokens is 5; .*task.overlong: drop"
    ):
        encode([SHORT, LONG], max_prompt_tokens=5)
    encoded = encode([LONG, SHORT, LONG], max_prompt_tokens=5, overlong="drop")
    assert (list(encoded), encoded.dropped) == ([(SHORT, ids("a b"))], 2)
    with pytest.raises(DataError, match=r"an empty data set: all 2 prompts are over task.max_prompt_tokens = 5"):
        encode([LONG, LONG], max_prompt_tokens=5, overlong="drop")
    with pytest.raises(DataError, match="an empty data set"):
        encode([])


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_a_prompt_that_leaves_no_room_for_the_response_names_the_settings(overlong):
    assert len(encode([LONG], context_length=10, overlong=overlong)) == 1
    message = r"long has 6 tokens; .*context of 9; lower sampling.max_new_tokens to 3, or set task.max_prompt_tokens: 5"
    with pytest.raises(DataError, match=message):
        encode([SHORT, LONG], context_length=9, overlong=overlong)
    with pytest.raises(RecipeError, match=r"max_new_tokens = 9 leaves no room for a prompt"):
        encode([SHORT], context_length=9, max_new_tokens=9, overlong=overlong)


def test_generated_problems_are_encoded_when_they_are_read():
    train = gym(eval_size=2).train
    read = []
    train._dataset = Counting(train._dataset, read)
    encoded = encode(train, context_length=2000)
    assert len(encoded) == 10_000 and 16 <= len(read) < 50  # type checks read a few at random
    assert encoded[5000][0] == train[5000]


class Counting:
    def __init__(self, inner, read):
        self.inner, self.read = inner, read

    def __getitem__(self, index):
        self.read.append(index)
        return self.inner[index]
