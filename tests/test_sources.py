"""Rollout sources: whose responses they are, what is kept on disk, what is replayed, and how they share a step."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_tokenizer

from opdkit.config import ModelConfig
from opdkit.errors import DataError, RunError
from opdkit.models import LanguageModel, load_model
from opdkit.rollouts.replay import ReplayBuffer
from opdkit.rollouts.responses import Response, ResponseStore, fingerprint, open_store
from opdkit.rollouts.rollout import Capture, Rollout
from opdkit.rollouts.sampler import Keep, Mixture, Sampling, prompt_keys, sample
from opdkit.rollouts.sources import Request, Supply, from_dataset
from opdkit.sources import Dataset, OnPolicy, Replay, TeacherSamples
from opdkit.tasks.problem import Problem, Task
from opdkit.train.state import pack, unpack

HOW = Sampling(group=2, max_new_tokens=12, eos_ids=(1, 3, 10, 12, 17, 28, 40))
PROBLEMS = [Problem(str(i), "p", answer="xy") for i in range(6)]
PROMPTS = [(p, (4, 5 + i)) for i, p in enumerate(PROBLEMS)]


@pytest.fixture(scope="module")
def teacher(teacher_path) -> LanguageModel:
    return load_model(ModelConfig(path=teacher_path), "tutor")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "responses"


@pytest.fixture
def supply(lm, teacher, cache) -> Supply:
    return Supply(lm, {"tutor": teacher}, Task("t", PROBLEMS, []), HOW, Keep(), seed=3)


def request(source, prompts=PROMPTS, **fields) -> Request:
    return Request(source, prompts, prompt_keys([ids for _, ids in prompts], 9), **fields)


def count_forwards(lm, run):
    calls = []
    handle = lm.model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    result = run()
    handle.remove()
    return len(calls), result


# ---------------------------------------------------------------------------------------------------------------------
# One step


def test_sources_do_not_share_groups(supply):
    requests = {"policy": request(OnPolicy(), PROMPTS[:2]), "data": request(Dataset(), PROMPTS[2:3])}
    found = supply.roll_out(requests, 7)
    assert [(r.group, r.source, r.version, r.problem.id) for r in found["policy"]] == [
        (0, "policy", 7, "0"), (0, "policy", 7, "0"), (1, "policy", 7, "1"), (1, "policy", 7, "1"),
    ]  # fmt: skip
    assert [(r.group, r.source, r.capture) for r in found["data"]] == [(2, "data", None)]


def test_dataset_rollouts_end_with_eos_or_at_the_limit(lm):
    problems = [Problem("a", "p", answer="abc"), Problem("b", "p", answer="abcdefgh")]
    task = Task("t", problems, [])
    prompts = [(p, (4, 5)) for p in problems]
    short, cut = from_dataset(lm, task, prompts, Sampling(max_new_tokens=5, eos_ids=(1, 0)))
    a = lm.tokenizer.encode("a")[0]
    assert (short.response_ids, short.finish, short.text) == ((a, a + 1, a + 2, 1), "stop", "abc")
    assert (cut.response_ids, cut.finish, cut.text) == (tuple(range(a, a + 5)), "length", "abcde")
    with pytest.raises(DataError, match="problem c has no response"):
        from_dataset(lm, task, [(Problem("c", "p"), (4,))], HOW)


def test_a_mixed_source_samples_with_the_teacher_and_its_own_prompts(supply, teacher):
    source = OnPolicy(mixed_with="tutor", mix=0.4)
    keys = prompt_keys([ids for _, ids in PROMPTS], 9)

    def direct(prompts):
        mixture = Mixture(teacher, 0.4, prompts)
        groups = sample(supply.student, [p for _, p in PROMPTS], HOW, 0, keys=keys, mixture=mixture)
        return [(s.ids, s.capture.behaviour.tolist()) for group in groups for s in group]

    def seen(rollouts):
        return [(r.response_ids, r.capture.behaviour.tolist()) for r in rollouts]

    found = supply.roll_out({"policy": request(source)}, 0)["policy"]
    assert seen(found) == direct(None)
    assert any(not torch.equal(r.capture.logp, r.capture.behaviour) for r in found)
    longer = replace(supply, read=lambda lm, rollouts: [replace(r, prompt_ids=(9, *r.prompt_ids)) for r in rollouts])
    again = longer.roll_out({"policy": request(source)}, 0)["policy"]
    assert seen(again) == direct([(9, *p) for _, p in PROMPTS]) != seen(found)
    assert [r.prompt_ids for r in again] == [p for _, p in PROMPTS for _ in range(2)]  # as the student reads them


# ---------------------------------------------------------------------------------------------------------------------
# A teacher's responses


def test_teacher_responses_are_sampled_once_and_kept(supply, teacher, cache):
    source = TeacherSamples(teacher="tutor")
    calls, first = count_forwards(teacher, lambda: supply.roll_out({"data": request(source, PROMPTS[:4])}, 0)["data"])
    assert calls > 0 and {r.source for r in first} == {"data"} and [r.group for r in first] == [0, 1, 2, 3]
    assert all(r.capture is None and r.prompt_ids == ids for r, (_, ids) in zip(first, PROMPTS[:4], strict=True))
    # what a teacher says does not depend on the step, on the other prompts, or on who asks
    how = replace(HOW, group=1)
    for r, (_, ids) in zip(first, PROMPTS[:4], strict=True):
        ((s,),) = sample(teacher, [ids], how, 3)
        assert (r.response_ids, r.text, r.finish) == (s.ids, s.text, s.finish)

    (file,) = cache.iterdir()
    assert len(file.read_text().splitlines()) == 4
    fresh = replace(supply, stores={})  # another run
    calls, again = count_forwards(teacher, lambda: fresh.roll_out({"data": request(source, PROMPTS[:4])}, 5)["data"])
    assert calls == 0 and [r.response_ids for r in again] == [r.response_ids for r in first]
    backwards = PROMPTS[5:1:-1]
    calls, more = count_forwards(teacher, lambda: fresh.roll_out({"data": request(source, backwards)}, 6)["data"])
    assert calls > 0 and [r.response_ids for r in more[2:]] == [r.response_ids for r in first[3:1:-1]]
    assert len(file.read_text().splitlines()) == 6


def test_one_sequence_per_prompt_however_often_it_is_asked_for(supply, cache):
    twice = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    found = supply.roll_out({"data": request(TeacherSamples(teacher="tutor"), twice)}, 0)["data"]
    assert found[0].response_ids == found[2].response_ids and [r.group for r in found] == [0, 1, 2]
    assert len(next(cache.iterdir()).read_text().splitlines()) == 2


def test_settings_that_change_the_responses_have_their_own_file(teacher, lm, cache, tmp_path):
    paths = {open_store(teacher, how, seed).path for how, seed in [
        (HOW, 0), (HOW, 1), (replace(HOW, temperature=0.0), 0), (replace(HOW, max_new_tokens=9), 0),
        (replace(HOW, stop=("x",)), 0), (replace(HOW, eos_ids=(1,)), 0)]}  # fmt: skip
    assert len(paths) == 6 and open_store(lm, HOW, 0).path not in paths
    assert open_store(teacher, replace(HOW, group=7, max_rows=3), 0).path in paths
    assert {path.parent for path in paths} == {
        cache
    } and not cache.exists()  # nothing is made before there is something


def test_a_models_fingerprint_is_its_weights_not_its_path(teacher, tmp_path):
    copy = load_model(ModelConfig(path=make_model(tmp_path, seed=2, layers=3)), "other name")
    assert fingerprint(copy) == fingerprint(teacher)
    layer = copy.model.model.layers[1].mlp.up_proj.weight.data
    kept = layer.clone()
    layer += 1e-4
    assert fingerprint(copy) != fingerprint(teacher)
    layer.copy_(kept)
    assert fingerprint(copy) == fingerprint(teacher)
    copy.model.requires_grad_(False)
    layer.requires_grad_(False)
    copy.model.model.norm.weight.requires_grad_(True)  # trained on top of a frozen base: not part of it
    assert fingerprint(copy) == fingerprint_without(copy, "model.norm.weight") != fingerprint(teacher)


def fingerprint_without(lm, name):
    before = fingerprint(lm)
    weight = dict(lm.model.named_parameters())[name]
    weight.data += 1.0
    after = fingerprint(lm)
    weight.data -= 1.0
    assert before == after
    return after


def test_greedy_teacher_responses(supply, teacher):
    found = supply.roll_out({"data": request(TeacherSamples(teacher="tutor", temperature=0.0))}, 0)["data"]
    for r, (_, ids) in zip(found, PROMPTS, strict=True):
        ((s,),) = sample(teacher, [ids], replace(HOW, group=1, temperature=0.0), 99)
        assert r.response_ids == s.ids


def test_a_teachers_own_eos_becomes_the_students(supply, teacher, monkeypatch):
    """The teacher ends with id 20, which the student does not use: the kept response has 20, the rollout the student's."""
    source = TeacherSamples(teacher="tutor")
    monkeypatch.setattr(teacher.model.generation_config, "eos_token_id", [20, 21, 22, 23, 24, 25, 26])
    narrow = replace(supply, how=replace(HOW, eos_ids=(1,)))
    found = narrow.roll_out({"data": request(source)}, 0)["data"]
    ended = [r for r in found if r.finish == "stop"]
    assert ended and all(r.response_ids[-1] == 1 for r in ended)
    kept = [narrow.stores[source].get(ids) for _, ids in PROMPTS]
    assert {r.ids[-1] for r in kept if r.finish == "stop"} - {1} <= set(range(20, 27))
    assert any(r.ids[-1] != 1 for r in kept if r.finish == "stop")
    assert [r.ids[:-1] for r in kept] == [r.response_ids[:-1] for r in found]


def test_a_broken_last_line_is_passed_over_and_written_again(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    store = ResponseStore(path)
    one, two, three = (Response((i, 1), f"t{i}", "stop") for i in (5, 6, 7))
    store.add((1, 2), one)
    store.add((3,), two)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # killed while it wrote
    again = ResponseStore(path)
    assert (again.get((1, 2)), again.get((3,)), again.get((4,))) == (one, None, None)
    again.add((3,), two)
    again.add((4,), three)
    last = ResponseStore(path)
    assert [last.get(p) for p in ((1, 2), (3,), (4,))] == [one, two, three]
    assert path.read_bytes().splitlines()[:3] == [*whole[:-9].splitlines(), whole.splitlines()[1]]


def test_the_first_response_to_a_prompt_stands(tmp_path):
    path = tmp_path / "x.jsonl"
    ours, theirs = ResponseStore(path), ResponseStore(path)
    theirs.add((1,), Response((8, 1), "b", "stop"))
    ours.add((1,), Response((9, 1), "c", "stop"))
    assert ResponseStore(path).get((1,)) == Response((8, 1), "b", "stop")


def _append(path, name, start):
    start.wait()
    store = ResponseStore(path)
    for i in range(40):
        store.add((name, i), Response((name,) * 300, "x" * 300, "length"))


def test_several_processes_append_whole_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=_append, args=(path, n, start)) for n in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    store = ResponseStore(path)
    assert len(store.found) == 160
    assert all(store.get((n, i)) == Response((n,) * 300, "x" * 300, "length") for n in range(4) for i in range(40))
    assert all(json.loads(line) for line in path.read_text().splitlines() if line)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(RunError, match=r"cannot be kept in .*y\.jsonl: .*set OPDKIT_CACHE"):
        ResponseStore(blocked / "y.jsonl").add((1,), Response((1,), "", "stop"))
    (tmp_path / "z.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot be kept in .*z\.jsonl"):
        ResponseStore(tmp_path / "z.jsonl")
    if os.path.exists("/dev/full"):
        (tmp_path / "full.jsonl").symlink_to("/dev/full")
        store = ResponseStore(tmp_path / "w.jsonl")
        store.path = tmp_path / "full.jsonl"
        with pytest.raises(RunError, match="No space left"):
            store.add((1,), Response((1,), "", "stop"))


# ---------------------------------------------------------------------------------------------------------------------
# Replay


def rollouts(n, start=0):
    row = torch.zeros(2)
    capture = Capture(row, row, row, torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1))
    return [
        Rollout(PROBLEMS[i % 6], (4, i), (7, 1), f"text {i}", i // 2, "stop", "policy", version=i, capture=capture,
                reward=i / 2, correct=i % 2 == 0)
        for i in range(start, start + n)
    ]  # fmt: skip


def test_the_buffer_keeps_the_newest_and_draws_without_replacement():
    buffer = ReplayBuffer(8)
    buffer.add(rollouts(5))
    assert buffer.draw(6, 0) == [] and len(buffer.draw(5, 0)) == 5
    buffer.add(rollouts(6, start=5))
    assert [r.version for r in buffer.kept] == list(range(3, 11)) and all(r.capture is None for r in buffer.kept)
    state = torch.get_rng_state()
    drawn = [tuple(r.version for r in buffer.draw(4, seed)) for seed in range(200)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(len(set(d)) == 4 for d in drawn) and drawn[7] == tuple(r.version for r in buffer.draw(4, 7))
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=11)[3:]
    assert counts.sum() == 800 and (counts - 100).abs().max() < 4 * (200 * 0.5 * 0.5) ** 0.5  # each with chance 1/2


def test_the_buffer_survives_a_checkpoint():
    buffer = ReplayBuffer(8)
    buffer.add(rollouts(10))
    buffer.add([replace(rollouts(1)[0], trained=(True, False), turns=(0, 1), reward=None, correct=None)])
    text = json.dumps(buffer.state())
    problems = {p.id: p for p in PROBLEMS}
    again = ReplayBuffer.restore(json.loads(text), problems)
    assert again.kept == buffer.kept and again.draw(3, 5) == buffer.draw(3, 5)
    assert json.dumps(again.state()) == text
    assert ReplayBuffer.restore(unpack(*pack(buffer.state())), problems).kept == buffer.kept
    again.add(rollouts(1, start=20))
    assert len(again) == 8 and again.kept[-1].version == 20
    with pytest.raises(
        RunError, match="response to problem '3', which the task does not have; resume with the same task"
    ):
        ReplayBuffer.restore(json.loads(text), {k: p for k, p in problems.items() if k != "3"})


def test_a_replay_source_takes_what_was_drawn_or_samples_afresh(supply):
    drawn = ReplayBuffer(8)
    drawn.add(rollouts(8))
    requests = {
        "policy": request(OnPolicy(), PROMPTS[:1]),
        "replay": request(Replay(), PROMPTS[1:3], replayed=drawn.draw(4, 1)),
    }
    found = supply.roll_out(requests, 11)
    assert [(r.source, r.group, r.capture) for r in found["replay"]] == [("replay", g, None) for g in (1, 1, 2, 2)]
    assert [r.version for r in found["replay"]] == [r.version for r in drawn.draw(4, 1)]
    assert all(r.version == 11 and r.capture for r in found["policy"])
    fresh = supply.roll_out({"policy": requests["policy"], "replay": request(Replay(), PROMPTS[1:3])}, 11)["replay"]
    assert [(r.source, r.group, r.version) for r in fresh] == [("replay", g, 11) for g in (1, 1, 2, 2)]
    plain = supply.roll_out({"policy": request(OnPolicy(), PROMPTS[1:3])}, 11)["policy"]
    assert [r.response_ids for r in fresh] == [r.response_ids for r in plain] and fresh[0].capture is not None


def test_a_foreign_vocabulary_is_not_mixed(supply, teacher):
    other = replace(supply, teachers={"tutor": replace(teacher, tokenizer=make_tokenizer("abc"))})
    with pytest.raises(ValueError, match="44 token ids and tutor 5"):
        other.roll_out({"policy": request(OnPolicy(mixed_with="tutor", mix=0.5))}, 0)
