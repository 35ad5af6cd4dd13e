"""Scoring while sampling: a second thread reads finished waves, and the run is the one that scores afterwards."""

import json
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_model
from test_loop import changed, metrics, run, same, weights
from test_processes import assert_same_run, launch

from opdkit.config import ModelConfig, parse_recipe
from opdkit.errors import DataError, NonFiniteError, RecipeError
from opdkit.method import View
from opdkit.models import load_model
from opdkit.plan import plan
from opdkit.rollouts import sampler
from opdkit.rollouts.sampler import Keep, Sampling
from opdkit.rollouts.sources import on_policy
from opdkit.tasks.problem import Problem
from opdkit.train import ahead
from opdkit.train.ahead import Ahead, check_ahead
from opdkit.train.setup import notes, set_up
from opdkit.views.batches import Batch

ROUTED = {"even": "a", "odd": "b"}
SUPPORTS = {
    "opd": "Sampled()",
    "full_opd": "Full()",
    "vopd": "Full()",
    "topk_kl": "TopK(4, 'union')",
    "grpo_opd": "Sampled()",
}


def routed(name: str) -> dict:
    """A published method with a teacher for each domain."""
    more = {"k": 4, "of": "union"} if name == "topk_kl" else {}
    return {
        "name": "compose",
        "base": {"name": name, **more},
        "views": {"teacher": f"View({ROUTED}, {SUPPORTS[name]})"},
    }


@pytest.fixture
def waves(recipe_data, teacher_path, tmp_path, tmp_path_factory) -> dict:
    """Two domains with a teacher each; the 12 responses of a step are sampled in three waves."""
    path = tmp_path / "domains.jsonl"
    rows = [{"id": f"{a}+{b}", "prompt": f"{a}+{b}=" + "?" * (b % 3), "answer": str(a + b),
             "domain": ("even", "odd")[a % 2]} for a in range(8) for b in range(8)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    other = make_model(tmp_path_factory.mktemp("other"), seed=3, layers=1)
    return changed(
        recipe_data, task__path=str(path), teachers={"a": {"path": teacher_path}, "b": {"path": other}},
        method=routed("opd"), sampling__max_rows=4, train__prompts_per_step=6, train__steps=3, train__score_tokens=60,
        train__score_ahead=True, eval__kl_prompts=0, eval__teacher=False,
    )  # fmt: skip


@pytest.fixture
def readers(monkeypatch) -> list[tuple[str, str]]:
    """(model, thread) of every pass over rollouts, the student's updates left out."""
    found, real = [], Batch.states

    def states(self, lm, rollouts):
        if not torch.is_grad_enabled():
            found.append((lm.name, threading.current_thread().name.partition("_")[0]))
        return real(self, lm, rollouts)

    monkeypatch.setattr(Batch, "states", states)
    return found


class Inline:
    """A pool that runs its jobs at once, in the same thread."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, cancel_futures):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize("name", SUPPORTS)
def test_reading_ahead_changes_no_run(waves, name, readers, tmp_path):
    data = changed(waves, method=routed(name))
    ours = run(data, output=str(tmp_path / "ahead"))
    assert {*readers} == {("a", "score-ahead"), ("b", "score-ahead")}  # scoring itself reads nothing again
    readers.clear()
    plain = run(data, train__score_ahead=False, output=str(tmp_path / "plain"))
    assert {*readers} == {("a", "MainThread"), ("b", "MainThread")}
    for a, b in zip(metrics(ours), metrics(plain), strict=True):
        for key in ("loss", "grad_norm", "reverse_kl", "entropy_teacher", "overlap_ratio", "reward"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    first, second = weights(ours), weights(plain)
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 2e-5  # learning rate 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_thread_changes_no_bit(waves, precision, monkeypatch, tmp_path):
    threaded = run(waves, train__precision=precision, output=str(tmp_path / "threaded"))
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Inline)
    inline = run(waves, train__precision=precision, output=str(tmp_path / "inline"))
    assert same(weights(threaded), weights(inline))


def test_a_wave_is_read_while_the_next_is_sampled(waves, monkeypatch):
    """The passes over the first wave wait until the second has begun: without overlap they would wait for ever."""
    begun, count, waited = threading.Event(), [], []
    sampling, reading = sampler._Wave.run, Ahead._states

    def run_wave(self, *arguments):
        count.append(1)
        if len(count) == 2:
            begun.set()
        return sampling(self, *arguments)

    def states(self, *arguments):
        waited.append(begun.wait(timeout=60))
        return reading(self, *arguments)

    setup = set_up(parse_recipe(waves))
    monkeypatch.setattr(sampler._Wave, "run", run_wave)
    monkeypatch.setattr(Ahead, "_states", states)
    from opdkit.train.rolling import Rolling

    found = Rolling(setup).step(1)["policy"]
    assert len(count) == 3 and all(waited) and all("teacher" in r.states for r in found)


def test_stopped_and_resumed_it_goes_on_as_if_uninterrupted(waves, tmp_path):
    whole = run(waves, train__steps=4, output=str(tmp_path / "whole"))
    run(waves, train__steps=2, output=str(tmp_path / "part"))
    part = run(waves, train__steps=4, output=str(tmp_path / "part"), resume=True)
    assert same(weights(whole), weights(part))


@pytest.mark.parametrize("balance", [1.0, float("inf")])
def test_prepare_steps_may_drop_what_was_read(waves, balance, readers, tmp_path):
    """With infinity a step may lose everything; its rollouts are then scored with weight 0."""
    data = changed(waves, method={"name": "uni_opd", "teacher": ROUTED, "balance": balance}, sampling__group=4,
                   train__steps=2)  # fmt: skip
    ours = run(data, output=str(tmp_path / "ahead"))
    assert {thread for _, thread in readers} == {"score-ahead"}
    plain = run(data, train__score_ahead=False, output=str(tmp_path / "plain"))
    a, b = weights(ours), weights(plain)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-5


def test_a_live_teacher_reads_while_it_samples(waves, readers, tmp_path):
    """With adapters too: both threads want them on, so nobody switches them."""
    live = {"path": "student:live", "temperature": 2.0}
    for name, lora in (("plain", None), ("lora", {"rank": 4, "targets": ["q_proj", "lm_head"]})):
        data = changed(waves, teachers={"teacher": live}, method={"name": "full_opd"}, lora=lora, train__steps=2)
        ours = run(data, output=str(tmp_path / f"{name}-ahead"))
        assert {*readers} == {("teacher", "score-ahead")}
        plain = run(data, train__score_ahead=False, output=str(tmp_path / name))
        assert [m["loss"] for m in metrics(ours)] == pytest.approx([m["loss"] for m in metrics(plain)], rel=1e-4)
        readers.clear()


def test_a_solution_is_shown_ahead_and_a_sibling_is_waited_for(waves, readers, tmp_path):
    views = {"sibling": "View('b', Sampled(), Shown((Sibling(),)))"}
    base = {"name": "full_opd", "teacher": "a"}
    method = {"name": "compose", "base": base, "views": views, "add": ["Term(signal=log_ratio(den='sibling'))"]}
    data = changed(waves, method=method, train__steps=2)
    setup = set_up(parse_recipe(data))
    late = [note for note in notes(setup) if "scored after sampling" in note]
    assert list(setup.read_ahead) == ["teacher"] and len(late) == 1 and "view 'sibling'" in late[0]
    ours = run(data)
    assert {*readers} == {("a", "score-ahead"), ("b", "MainThread")}
    plain = run(data, train__score_ahead=False, output=str(tmp_path / "plain"))
    a, b = weights(ours), weights(plain)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-5
    readers.clear()
    run(changed(waves, method={"name": "opsd"}, teachers={"teacher": waves["teachers"]["a"]}, train__steps=1),
        output=str(tmp_path / "opsd"))  # fmt: skip
    assert {*readers} == {("teacher", "score-ahead")}


def test_two_processes_read_ahead(waves, tmp_path):
    data = changed(waves, train__prompts_per_step=7, sampling__max_rows=2, eval__kl_prompts=4)
    one = run(data, output=str(tmp_path / "one"))
    assert launch(tmp_path, [{"recipe": changed(data, output=str(tmp_path / "two"))}]) == {}
    assert_same_run(one, tmp_path / "two")


def test_a_plan_counts_the_states_and_the_passes_beside_sampling(waves):
    """[tokens, width] for the one view, of the wider teacher, and the largest pass."""
    found = []
    for on in (True, False):
        phases = plan(parse_recipe(changed(waves, train__score_ahead=on)), "H100-80GB").phases
        found.append({phase.name: {part.what: part.bytes for part in phase.parts} for phase in phases})
    ahead_, plain = found
    more = {name: ahead_[name].keys() - plain[name].keys() for name in ("sample", "score", "update")}
    assert "hidden states that are read ahead" in more["sample"] & more["score"] and len(more["sample"]) == 2
    assert not more["update"]
    assert ahead_["sample"]["hidden states that are read ahead"] == 12 * 8 * 32 * 4


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("wave", [1, 3])
def test_what_a_pass_raises_stops_the_run(waves, monkeypatch, wave):
    real, passes = Ahead._states, []

    def states(self, *arguments):
        passes.append(1)
        if len(passes) == 2 * wave - 1:  # two teachers a wave
            raise DataError("something is wrong with problem 3")
        return real(self, *arguments)

    monkeypatch.setattr(Ahead, "_states", states)
    with pytest.raises(DataError, match="something is wrong with problem 3"):
        run(waves)
    assert not [t for t in threading.enumerate() if t.name.startswith("score-ahead")]


def test_an_error_while_sampling_ends_the_thread(waves, monkeypatch):
    real, count = sampler._Wave.run, []

    def run_wave(self, *arguments):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(sampler._Wave, "run", run_wave)
    with pytest.raises(KeyboardInterrupt):
        run(changed(waves, eval__kl_prompts=0), train__steps=1)
    assert not [t for t in threading.enumerate() if t.name.startswith("score-ahead")]


def test_a_teacher_that_returns_nan_stops_the_step_and_is_saved(waves, monkeypatch):
    real = Batch.states

    def broken(self, lm, rollouts):
        states = real(self, lm, rollouts)
        return states.fill_(float("nan")) if lm.name == "b" else states

    monkeypatch.setattr(Batch, "states", broken)
    with pytest.raises(NonFiniteError, match=r"step 1: model 'b' .* returned NaN .*batch saved in"):
        run(waves)
    saved = json.loads((Path(waves["output"]) / "nonfinite" / "step-000001" / "policy.json").read_text())
    assert len(saved) == 12
    masked = run(waves, train__bad_scores="mask", train__steps=1, output=waves["output"] + "-masked")
    assert metrics(masked)[0]["count/bad_scores"] > 0


@pytest.mark.parametrize(("changes", "said"), [
    ({"sampling__max_rows": 256}, "a step's 12 responses are one wave .* lower sampling.max_rows to 6 or less"),
    ({"sampling__max_rows": 12}, "one wave"),
    ({"method": {"name": "grpo"}, "teachers": {}}, "method grpo has no views"),
    ({"method": {"name": "seqkd", "teacher": "a"}, "sampling__group": 1}, "has no source that samples from the student"),
    ({"method": {"name": "prune_opd", "teacher": "a", "k": 8, "drop": 0.34, "adapt": False, "stop_every": 3}},
     "view 'teacher': its model reads along"),
    ({"method": {"name": "sdpo", "teacher": "a", "k": 4}}, "view 'teacher': its context reads rollouts.reward"),
    ({"teachers__a__path": "student:base", "lora": {"rank": 4}, "method": {"name": "opd", "teacher": "a"}},
     "view 'teacher': its model is the student's modules, whose adapters are switched"),
])  # fmt: skip
def test_settings_without_effect(waves, changes, said):
    data = changed(waves, **changes)
    if data["method"].get("teacher") == "a":
        del data["teachers"]["b"]
    with pytest.raises(RecipeError, match=f"train.score_ahead has no effect: .*{said}"):
        set_up(parse_recipe(data))


@pytest.mark.parametrize(("changes", "processes", "said"), [
    ({"train__sharding": "fsdp2"}, 2, "communicates inside models, which two threads must not do"),
    ({"tools": {"environment": "calculator"}}, 1, "works without tools"),
    ({}, 3, "a step's 4 responses are one wave"),
])  # fmt: skip
def test_settings_that_cannot_work(waves, changes, processes, said):
    recipe = parse_recipe(changed(waves, **changes))
    method = set_up(parse_recipe(waves)).method
    with pytest.raises(RecipeError, match=said):
        check_ahead(recipe, method, {"policy": 6}, processes)
    check_ahead(recipe.model_copy(update={"train": recipe.train.model_copy(update={"score_ahead": False})}), method,
                {"policy": 6}, processes)  # fmt: skip


def test_angles_that_change_with_the_length_are_not_shared(waves):
    setup = set_up(parse_recipe(changed(waves, teachers={"teacher": {"path": "student:live"}}, method={"name": "opd"})))
    setup.student.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RecipeError, match="view 'teacher': its model also samples, and its rotary angles change"):
        assert setup.read_ahead is None


# ---------------------------------------------------------------------------------------------------------------------
# Streams, with a stand-in for CUDA that writes down who waits for whom


def test_streams_wait_for_each_other(lm, teacher_path, monkeypatch):
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            log.append(f"{self.name} marks")
            return f"what {self.name} had launched"

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

    main, own = Stream("main"), Stream("own")

    @contextmanager
    def stream(given):
        log.append(f"on {given.name}")
        yield
        log.append(f"off {given.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: log.append(f"memory kept for {s.name}"))
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Inline)
    teacher = load_model(ModelConfig(path=teacher_path), "teacher")
    real = Batch.states
    monkeypatch.setattr(Batch, "states", lambda self, *given: (log.append("reads"), real(self, *given))[1])
    prompts = [(Problem("0", "a"), (5, 6, 7)), (Problem("1", "b"), (9, 8))]
    rollouts = on_policy(lm, prompts, Sampling(1, 4, eos_ids=(1,)), 7, Keep(4))
    log.clear()
    with Ahead({"v": View("teacher")}, lambda name, view, of: [(teacher, [0, 1], of)], 512,
               device=torch.device("cuda")) as reading:  # fmt: skip
        reading.take("policy", dict(enumerate(rollouts)))
        assert log == ["main marks", "on own", "own waits for what main had launched", "reads", "own marks", "off own"]
        log.clear()
        found = reading.attach("policy", rollouts)
    assert log == ["main waits for what own had launched", "memory kept for main", "memory kept for main"]
    assert [r.states["v"].shape[0] for r in found] == [len(r.response_ids) for r in rollouts]
