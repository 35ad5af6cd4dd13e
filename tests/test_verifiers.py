"""Environments of the library `verifiers`: a small one with the documented methods, and the library's own where it is
installed (`pip install 'opdkit[verifiers]'`): a SingleTurnEnv and a ToolEnv of 0.3, or a taskset with tools of 0.4.

The library is an optional extra, so its tests are skipped without it; the adapter's own logic is tested in any case.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import make_model, make_tokenizer
from test_tools import CHAT, PROBLEM, RudeWorld, rows, scripted, shown  # noqa: F401
from test_turns import QWEN, make_lm

from opdkit.config import TaskConfig, parse_recipe
from opdkit.errors import DataError, RecipeError
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.calls import TemplateCalls, TextCalls
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.tools import ToolUse
from opdkit.tasks.environments import Limits, make_environment
from opdkit.tasks.load import load_task
from opdkit.tasks.problem import Verdict
from opdkit.train.loop import train

# ---------------------------------------------------------------------------------------------------------------------
# A small one


class SmallRubric:
    has_group_rewards = False

    async def score_rollout(self, state):
        assert state["prompt"][-1]["role"] == "user" and state["info"] == {} and state["input"]["answer"]
        state["reward"] = float(state["completion"][-1]["content"].strip() == state["answer"])


class SmallToolEnv:
    """As a verifiers.ToolEnv: data sets of rows, `tool_defs`, an asynchronous `call_tool` that returns a message."""

    max_turns = 10

    def __init__(self, size, tools=True, held=True):
        rows = [{"prompt": [{"role": "user", "content": f"{n}+{n}=?"}], "answer": str(2 * n)} for n in range(size)]
        self.rows, self.eval_dataset, self.rubric = rows, rows[:3] if held else None, SmallRubric()
        parameters = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
        self.tool_defs = [SimpleNamespace(name="double", description="twice x", parameters=parameters)] if tools else []

    def get_dataset(self, n=-1, seed=None):
        return self.rows

    def get_eval_dataset(self, n=-1, seed=None):
        return self.eval_dataset

    async def call_tool(self, tool_name, tool_args, tool_call_id, **kwargs):
        return SimpleNamespace(role="tool", content=str({"double": lambda x: 2 * x}[tool_name](**tool_args)))


def load_small(size=8, kind="tools", held=True):
    made = SmallToolEnv(size, held=held)
    methods = {"get_dataset": made.get_dataset, "get_eval_dataset": made.get_eval_dataset}
    if kind == "stateful":
        made.update_tool_args = None
    if kind == "group":
        made.rubric.has_group_rewards = True
    if kind == "nothing":
        made.get_dataset = lambda: (_ for _ in ()).throw(ValueError("dataset is not set"))
    if kind == "single":
        return SimpleNamespace(**vars(made), **methods, max_turns=1)
    if kind == "game":
        return SimpleNamespace(**vars(made), **methods, max_turns=-1)
    if kind == "built":  # the evaluation set is made when it is asked for
        found, made.eval_dataset, made.eval_dataset_source = made.eval_dataset, None, "a function"
        made.get_eval_dataset = lambda: found
    return made


SMALL = TaskConfig(kind="verifiers", path="test_verifiers:load_small", settings={"size": 6}, eval_size=2)


def small(**settings):
    return SMALL.model_copy(update={"settings": {"size": 6, **settings}})


@pytest.mark.parametrize("kind", ["tools", "single", "built"])
def test_an_environment_as_a_task(kind):
    task = load_task(small(kind=kind))
    assert len(task.eval) == 2 and [p.answer for p in task.train] == ["6", "8", "10"]  # no prompt of the evaluation set
    assert task.verify(task.train[0], " 6\n") == Verdict(1.0, True)
    assert task.verify(task.train[0], "5") == Verdict(0.0, False)


def test_without_an_evaluation_set_problems_are_held_out():
    task = load_task(small(held=False))
    assert len(task.eval) == 2 and len(task.train) == 4


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"path": "test_verifiers:nothing"}, RecipeError, "cannot be imported"),
        ({"path": "test_tools:RudeWorld", "settings": {}}, RecipeError, "without get_dataset"),
        ({"name": "x"}, RecipeError, r"task\.name"),
        ({"settings": {"kind": "group"}}, RecipeError, "compares the answers of a group"),
        ({"settings": {"kind": "game"}}, RecipeError, "answers the model by itself"),
        ({"settings": {"kind": "nothing"}}, DataError, "gives no training data: dataset is not set"),
    ],
)
def test_environments_that_cannot_be_used(change, error, says):
    assert RudeWorld.tools
    with pytest.raises(error, match=says):
        load_task(SMALL.model_copy(update=change))


def double_use(settings):
    """The tools of an environment that can double, for a chat model."""
    world = make_environment("verifiers", settings)
    return ToolUse(world, TemplateCalls(world.tools, CHAT), 4, Limits())


def doubled(scripted, use, name):  # noqa: F811
    """What a model reads after it has called a tool twice, once with an argument that is no number."""
    lm = make_lm(QWEN)
    calls = [json.dumps({"name": name, "arguments": {"x": x}}) for x in (21, [{}])]
    turns = [*(f"<tool_call>{call}</tool_call><|end|>" for call in calls), "42<|end|>"]
    problem = replace(PROBLEM, tools=use.environment.tools)
    [rollout], _ = scripted(lm, use, [turns], limit=900, problems=[problem])
    assert shown(lm, rollout)[1][0] == "\n<|start|>user\n=42<|end|>\n<|start|>assistant\n"
    assert rollout.final == "42"
    return rollout.calls


def test_the_tools_of_an_environment(scripted):  # noqa: F811
    settings = {"path": "test_verifiers:load_small", "size": 4}
    use = double_use(settings)
    assert use.environment.tools[0]["function"]["name"] == "double"
    assert doubled(scripted, use, "double") == ("ok", "ok")
    for kind, says in (("single", "has no tools"), ("stateful", "the state of a rollout")):
        with pytest.raises(RecipeError, match=says):
            make_environment("verifiers", settings | {"kind": kind})


# ---------------------------------------------------------------------------------------------------------------------
# The library's own environments (to 0.3)


def sums(count):
    return [{"question": f"{n}+{n}=?", "answer": str(2 * n), "info": json.dumps({"n": n})} for n in range(count)]


def double(x: int) -> int:
    """Twice a number.

    Args:
        x: the number
    """
    return 2 * x


def parts(x: int) -> list:
    """A number as parts of a message.

    Args:
        x: the number
    """
    return [{"type": "text", "text": str(x)}, {"type": "text", "text": "!"}]


async def right(completion, answer, info):
    """Reads messages by attribute, as new rubrics do."""
    assert info["n"] * 2 == int(answer) and completion[-1].role == "assistant"
    return float(completion[-1].content.strip() == answer)


def short(parser, completion, state, **kwargs):
    """Reads them through a parser and by key, as old ones do."""
    assert state["prompt"][0]["role"] == "system"
    return float(len(parser.parse_answer(completion)) < 3 and len(completion[-1]["content"]) < 9)


def fails(completion):
    raise KeyError("no such thing")


def load_classic(size=8, kind="single", wrong=False, held=False):
    import verifiers as vf
    from datasets import Dataset

    rubric = vf.Rubric(funcs=[fails] if wrong else [right, short], weights=[1.0] if wrong else [0.75, 0.25])
    data = {"dataset": Dataset.from_list(sums(size)), "rubric": rubric, "system_prompt": "Add."}
    if held:
        data["eval_dataset"] = lambda: Dataset.from_list(sums(2))
    if kind == "tools":
        return vf.ToolEnv(tools=[double, parts], **data)
    if kind == "one tool":
        return vf.ToolEnv(tools=[double], **data)
    return vf.SingleTurnEnv(**data)


@pytest.fixture
def classic():
    vf = pytest.importorskip("verifiers", reason="the extra `verifiers` is not installed")
    if not hasattr(vf, "ToolEnv"):
        pytest.skip("this version of verifiers has tasksets in place of environments")


CLASSIC = TaskConfig(kind="verifiers", path="test_verifiers:load_classic", settings={"size": 6}, eval_size=2)


@pytest.mark.parametrize("kind", ["single", "tools"])
def test_a_real_environment_as_a_task(classic, kind):
    task = load_task(CLASSIC.model_copy(update={"settings": {"size": 6, "kind": kind}}))
    problem = next(p for p in (*task.train, *task.eval) if p.answer == "4")
    assert [message["role"] for message in problem.prompt] == ["system", "user"] and len(task.train) == 4
    assert task.verify(problem, " 4") == Verdict(1.0, True)  # 0.75 + 0.25: both kinds of reading work
    assert task.verify(problem, "5") == Verdict(0.25, False)
    assert task.verify(problem, "far too long") == Verdict(0.0, False)


def test_a_real_evaluation_set_that_is_made_when_it_is_asked_for(classic):
    task = load_task(CLASSIC.model_copy(update={"settings": {"size": 6, "held": True}}))
    assert [p.answer for p in task.eval] == ["0", "2"] and len(task.train) == 4


def test_a_real_reward_that_raises_is_not_a_zero(classic):
    task = load_task(CLASSIC.model_copy(update={"settings": {"size": 6, "wrong": True}}))
    rollout = Rollout(task.train[0], (1,), (1,), "4", 0, "stop")
    with pytest.raises(DataError, match=r"problem train:.*no such thing"):
        verify_rollouts(task, [rollout])


def test_the_tools_of_a_real_environment(classic, scripted):  # noqa: F811
    use = double_use({"path": "test_verifiers:load_classic", "kind": "tools"})
    schema = use.environment.tools[0]["function"]
    assert schema["name"] == "double" and schema["parameters"]["properties"]["x"]["type"] == "integer"
    assert doubled(scripted, use, "double") == ("ok", "ok")  # the tool itself makes a list of a list
    assert use.environment.call("parts", {"x": 3}).text == "3\n!"
    with pytest.raises(KeyError):
        use.environment.call("treble", {"x": 3})


# ---------------------------------------------------------------------------------------------------------------------
# The library's tasksets (from 0.4)


def load_taskset(size=8, kind="plain"):
    import verifiers.v1 as vf

    class Sum(vf.TaskData):
        answer: str

    class Adding(vf.Task[Sum]):
        @vf.reward(weight=0.75)
        async def right(self, trace) -> float:
            return float(trace.last_reply == self.data.answer)

        @vf.reward(weight=0.25)
        async def short(self, task, trace) -> float:
            assert task.prompt and trace.messages[0].role == "system" and trace.num_turns == 1
            return float(len(trace.last_reply) < 9)

    class Failing(Adding):
        @vf.reward
        async def broken(self, trace) -> float:
            raise KeyError("no such thing")

    class Boxed(Adding):
        @vf.reward
        async def files(self, trace, runtime) -> float:
            return 1.0

    class Prepared(Adding):
        async def setup(self, trace, runtime) -> None:
            return None

    class Silent(vf.Task[Sum]):
        pass

    task_type = {"failing": Failing, "boxed": Boxed, "prepared": Prepared, "silent": Silent}.get(kind, Adding)

    class Numbers(vf.Toolset[vf.SharedToolsetConfig]):
        @vf.tool
        def double(self, x: int) -> int:
            """Twice a number."""
            return 2 * x

    class Kept(vf.State):
        last: int = 0

    class Remembering(vf.Toolset[vf.SharedToolsetConfig, Kept]):
        @vf.tool
        def again(self) -> int:
            return self.state.last

    class Sums(vf.Taskset[task_type]):
        INFINITE = kind == "endless"

        def load(self):
            n = 0
            while self.INFINITE or n < size:
                yield task_type(Sum(prompt=f"{n}+{n}=?", system_prompt="Add.", answer=str(2 * n)))
                n += 1

        @classmethod
        def toolsets(cls, config):
            return {"plain": [Numbers(vf.SharedToolsetConfig())], "state": [Remembering(vf.SharedToolsetConfig())],
                    "away": [Numbers(vf.SharedToolsetConfig(url="http://localhost:1"))]}.get(kind, [])  # fmt: skip

    return Sums(vf.TasksetConfig())


@pytest.fixture
def tasksets():
    pytest.importorskip("verifiers.v1", reason="the extra `verifiers` is not installed")
    pytest.importorskip("mcp.server.mcpserver", reason="tasksets need verifiers 0.4")


TASKSET = TaskConfig(kind="verifiers", path="test_verifiers:load_taskset", settings={"size": 6}, eval_size=2)


def test_a_taskset_as_a_task(tasksets):
    task = load_task(TASKSET)
    problem = next(p for p in (*task.train, *task.eval) if p.answer == "4")
    assert (problem.prompt, problem.system, len(task.train), len(task.eval)) == ("2+2=?", "Add.", 4, 2)
    assert task.verify(problem, " 4\n") == Verdict(1.0, True) and task.verify(problem, "5") == Verdict(0.25, False)
    assert task.verify(problem, "far too long") == Verdict(0.0, False)
    endless = load_task(TASKSET.model_copy(update={"settings": {"kind": "endless"}, "train_size": 5}))
    assert len(endless.train) == 5 and len(endless.eval) == 2


def test_a_tasksets_reward_that_raises_is_not_a_zero(tasksets):
    task = load_task(TASKSET.model_copy(update={"settings": {"kind": "failing"}}))
    with pytest.raises(DataError, match=r"problem task:.*no such thing"):
        verify_rollouts(task, [Rollout(task.train[0], (1,), (1,), "4", 0, "stop")])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("endless", "never ends; set task.train_size"), ("boxed", "reward 'files' of .* needs a runtime"),
        ("prepared", "prepare a runtime"), ("silent", "have no rewards"),
    ],
)  # fmt: skip
def test_tasksets_that_cannot_be_used(tasksets, kind, says):
    with pytest.raises(RecipeError, match=says):
        load_task(TASKSET.model_copy(update={"settings": {"kind": kind}}))


def test_the_tools_of_a_taskset(tasksets, scripted):  # noqa: F811
    use = double_use({"path": "test_verifiers:load_taskset"})
    schema = use.environment.tools[0]["function"]
    assert schema["name"] == "numbers_double" and schema["description"] == "Twice a number."
    assert schema["parameters"]["properties"]["x"]["type"] == "integer" and schema["parameters"]["required"] == ["x"]
    assert doubled(scripted, use, "numbers_double") == ("ok", "error")  # the library checks the argument
    for kind, says in (("state", "the state of a rollout"), ("away", "is served at"), ("endless", "has no tools")):
        with pytest.raises(RecipeError, match=says):
            make_environment("verifiers", {"path": "test_verifiers:load_taskset", "kind": kind})


# ---------------------------------------------------------------------------------------------------------------------
# A run


def trained(tmp_path, monkeypatch, path, **settings):
    """A short run of a random student that calls a real environment's tool, and its last line of metrics."""
    tokenizer = make_tokenizer("?= \n12+ERO.Ad0345678")
    paths = [make_model(tmp_path / str(s), s, tokenizer=tokenizer, rows=32) for s in (1, 2)]
    monkeypatch.setattr(
        "opdkit.rollouts.tools.TextCalls", lambda *names: TextCalls(*names, word="")
    )  # any line is a call
    where = {"path": path, **settings}
    run = train(parse_recipe({
        "method": {"name": "grpo_opd"}, "student": {"path": paths[0]}, "teachers": {"teacher": {"path": paths[1]}},
        "task": {"kind": "verifiers", "path": path, "settings": settings, "eval_size": 2},
        "tools": {"environment": "verifiers", "settings": where, "calls": "text", "turns": 3},
        "sampling": {"group": 2, "max_new_tokens": 70}, "train": {"steps": 2, "prompts_per_step": 3},
        "eval": {"kl_prompts": 2, "teacher": False}, "log": {"top_k": 4, "trackers": []}, "output": str(tmp_path / "run"),
    }))  # fmt: skip
    return rows(run)[-1]


def test_a_run_on_a_real_environment(classic, tmp_path, monkeypatch):
    last = trained(tmp_path, monkeypatch, "test_verifiers:load_classic", kind="one tool")
    assert math.isfinite(last["loss"]) and 0 <= last["reward"] <= 1 and last["tools/calls"] > 0


def test_a_run_on_a_real_taskset(tasksets, tmp_path, monkeypatch):
    last = trained(tmp_path, monkeypatch, "test_verifiers:load_taskset")
    assert math.isfinite(last["loss"]) and 0 <= last["reward"] <= 1 and last["tools/calls"] > 0
