"""The plan's less common costs, by hand: contexts, teachers that are the student, hooks, teachers that read along, tools."""

import json

import pytest
import torch
from test_plan_time import Flat

from opdkit.config import load_recipe, parse_recipe
from opdkit.contexts import Feedback, Shown, Sibling, Solution
from opdkit.extrapolate import EffOPD
from opdkit.hooks import Work
from opdkit.lora import EMA, LIVE
from opdkit.plan import as_text, plan
from opdkit.plan.datasheet import LAUNCH, OPERATIONS, Datasheet
from opdkit.plan.hardware import GPUS
from opdkit.plan.memory import cache_bytes
from opdkit.plan.passes import Products, exact_kl_flops, sampling_flops, scoring_flops
from opdkit.plan.reading import Reading, _assumed
from opdkit.plan.texts import Lengths, chance
from opdkit.plan.timing import timings

GIVEN = "View('teacher', context=Shown((Solution('answer'),){more}))"


@pytest.fixture
def data(recipe_data, tmp_path):
    """Prompts of 4 tokens with answers of one, each character a token: 8 responses of up to 8 tokens a step."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe_data["task"] |= {"path": str(tmp_path / "one.jsonl"), "template": "plain"}
    recipe_data["train"] |= {"packing": False, "score_tokens": 10_000}
    return recipe_data


def job(data, gpu="H100-80GB", **changes):
    """The job of a changed recipe, without times."""
    return plan(parse_recipe(data | changes), gpu, timed=False).job


def composed(view, **more):
    return {"name": "compose", "terms": ["Term(signal=log_ratio())"], "views": {"teacher": view}, **more}


def timed(job):
    return {t.phase: (t.seconds, t.times) for t in timings(job, Flat())}


def parts(phases, name):
    (phase,) = [phase for phase in phases if phase.name == name]
    return {part.what: part.bytes for part in (*phase.resident, *phase.parts)}


# ---------------------------------------------------------------------------------------------------------------------
# Contexts


def test_texts_are_read_behind_other_prompts():
    texts = Lengths((2, 4), 3).texts(2, 4)
    reading = Reading((20, 10), 30, apart=2)
    found = reading.reread(texts)
    assert [t.response_ids for t in found] == [t.response_ids for t in texts]
    assert {len(a.prompt_ids): len(b.prompt_ids) for a, b in zip(texts, found, strict=True)} == {2: 10, 4: 20}
    first = [t.prompt_ids for t in found[:4]]
    assert first[0] == first[1] != first[2] == first[3]  # two runs of equal prompts
    assert first[3] != found[4].prompt_ids and {len(t.prompt_ids) for t in reading.reread(texts, longest=True)} == {30}
    assert reading.shrunk(0.5) == Reading((10, 5), 10, 2)


@pytest.mark.parametrize(("assess", "prompt", "runs"), [(False, 1 + 1 + 4, 1), (True, 1 + 1 + 9 + 1 + 4, 2)])
def test_a_solution_makes_the_teachers_prompts_longer(data, assess, prompt, runs):
    """answer, line, (the longer of `correct` and `incorrect`, line), problem: the prompt that is scored."""
    own = job(data)
    told = job(data, method=composed(GIVEN.format(more=", assess=True" if assess else "")))
    reading = told.readings["teacher", "teacher"]
    assert (set(reading.prompts), reading.longest, reading.apart) == ({prompt}, prompt, runs)
    p = Products.of(told.teachers["teacher"])
    for found, length in ((own, 4 + 8 - 1), (told, prompt + 8 - 1)):  # 8 padded rows; the last token predicts nothing
        forward = p.token * 8 * length + p.pair * 8 * length * (length + 1) // 2
        assert scoring_flops(found) == forward + p.logits * 64
    assert sampling_flops(told) == sampling_flops(own)


def test_a_longer_prompt_takes_memory_where_it_is_scored(data):
    data["train"]["score_tokens"] = 40
    found = [plan(parse_recipe(data | {"method": m}), timed=False) for m in (composed("View('teacher')"),
             composed(GIVEN.format(more="")))]  # fmt: skip
    names = [[p.what for p in f.phases[1].parts] for f in found]  # 40 // 12 and 40 // 14 rows of a pass
    assert [any(n.endswith("of 3 rows") for n in names[0]), any(n.endswith("of 2 rows") for n in names[1])] == [
        True,
        True,
    ]
    said = "view 'teacher': teacher reads prompts of 6 tokens on average, at most 6 (the student 4, at most 4)"
    assert said in found[1].notes


def test_a_sibling_is_as_long_as_a_response(data):
    """Of every group's two responses one is shown the other: its 8 tokens and a number that tells them apart, and a line."""
    method = composed("View('teacher', context=Shown((Sibling(), Solution('answer'))))")
    reading = job(data, method=method).readings["teacher", "teacher"]
    assert (set(reading.prompts), reading.longest) == ({8 + 1 + 1 + 4}, 14) and reading.apart == 2
    short = plan(parse_recipe(data | {"method": method}), response=2.0, timed=False).job.readings["teacher", "teacher"]
    assert (set(short.prompts), short.longest) == ({2 + 1 + 1 + 4}, 14)


def test_a_context_without_data_counts_what_is_known():
    both = (Sibling(), Solution())
    assert _assumed(Shown(both), 8) == 8 and _assumed(Shown(both, max_tokens=5), 8) == 5
    assert _assumed(Shown(both, every=True, max_tokens=5), 8) == 10
    assert _assumed(Shown((Solution(),)), 8) == 0 == _assumed(Shown((Feedback(),)), 8)


def test_a_context_that_leaves_no_room_is_said(data):
    data["sampling"]["max_new_tokens"] = 60  # of a context of 128
    method = composed("View('teacher', context=Shown((Sibling(), Solution('answer')), every=True))")
    notes = plan(parse_recipe(data | {"method": method}), timed=False).notes
    assert not any("leaves no room" in note for note in notes)
    data["sampling"]["max_new_tokens"] = 63
    notes = plan(parse_recipe(data | {"method": method}), timed=False).notes
    assert any("a prompt of 71 tokens leaves no room for a response in teacher's context" in note for note in notes)


# ---------------------------------------------------------------------------------------------------------------------
# Teachers that are the student


@pytest.mark.parametrize(
    ("path", "lora", "dtype", "weights", "average"),
    [
        (EMA, None, "float32", 4, 0), (EMA, None, "bfloat16", 2, 4), (LIVE, None, "float32", 0, 0),
        (EMA, {"rank": 2}, "float32", 0, 4), (LIVE, {"rank": 2}, "float32", 0, 0),
    ],
)  # fmt: skip
def test_an_average_is_a_second_set_of_weights(data, path, lora, dtype, weights, average):
    """Bytes for each trained number: of the copy, and of the float32 average beside it or of the adapters'."""
    teacher = {"path": path} | ({} if dtype == "float32" else {"dtype": dtype})
    found = plan(parse_recipe(data | {"teachers": {"teacher": teacher}, "lora": lora}), timed=False)
    always, student = parts(found.phases, "sample"), found.models["student"]
    assert always.get("teacher weights", 0) == weights * student.parameters
    assert always.get("teacher's average", 0) == average * student.trained
    assert "evaluate teacher" not in timed(found.job)  # it is the student at the start


def test_the_student_as_it_is_has_no_divergence_from_itself(data):
    texts = Lengths((4,), 8).texts(2, 1)
    live, average = (job(data, teachers={"teacher": {"path": path}}) for path in (LIVE, EMA))
    assert exact_kl_flops(live, texts) == 0 < exact_kl_flops(average, texts)


def test_moving_an_average_is_part_of_an_update(data):
    still, moving = (job(data, teachers={"teacher": {"path": path}}) for path in (LIVE, EMA))
    gpu = GPUS["H100-80GB"]
    more = Datasheet(moving, gpu).update() - Datasheet(still, gpu).update()
    bandwidth = 0.6 * 1e9 * gpu.bandwidth
    assert more == pytest.approx(12 * moving.student.parameters / bandwidth, rel=1e-6)  # read 4, and 8 read and written


# ---------------------------------------------------------------------------------------------------------------------
# Hooks


def test_a_jump_by_hand(data):
    method = {"name": "effopd", "problems": 6, "tries": 2}
    data["train"]["steps"] = 5  # jumps at 1, 2 and 4
    found = plan(parse_recipe(data | {"method": method}), None, timed=False)
    # of each of two layers: q and o 32 x 32, k and v 16 x 32, their norms of 16, three of 32 x 64, post_attention's norm of 32
    blocks = 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 16 + 3 * 32 * 64 + 32)
    assert found.job.works == {"jump": Work(3, 3, 6, blocks, blocks, 2 * blocks)}
    assert timed(found.job)["hook jump"] == (3 * 1.0, 3)
    assert parts(found.phases, "update")["jump's copy of weights"] == blocks
    at = parts(found.phases, "hooks")
    assert at["jump's copies of weights"] in (blocks, 2 * blocks)
    on_gpu = plan(parse_recipe(data | {"method": method}), timed=False)  # copies are in main memory
    assert "jump's copies of weights" not in parts(on_gpu.phases, "hooks")
    assert "hook 'jump' acts 3 times, each with at most 3 x 6 responses to training problems" in found.notes


def test_hooks_that_score_nothing_or_do_nothing(data):
    weights = {"a.mlp": torch.zeros(3), "head": torch.zeros(5)}
    assert EffOPD(accept="always", tries=3).work(64, weights) == Work(7, 0, 0, 12, 12, 24)
    assert EffOPD(reference="trained", moved="all").work(3, weights) == Work(2, 6, 50, 32, 32, 32)
    assert EffOPD(tries=0).work(64, weights) == Work()
    assert "hook jump" not in timed(job(data, method={"name": "effopd", "tries": 2, "accept": "always"}))


# ---------------------------------------------------------------------------------------------------------------------
# A teacher that reads along


def reading_along(data, every):
    method = {"name": "prune_opd", "k": 4, "adapt": False}
    return job(data, method=method | ({} if every is None else {"stop_every": every}))


def test_reading_along_moves_the_teachers_pass_into_sampling(data):
    apart, along = reading_along(data, None), reading_along(data, 4)
    p = Products.of(along.teachers["teacher"])
    tokens, pairs = 4 * (4 + 2 * 7), 4 * (10 + 2 * (7 * 4 + 28))  # a prompt once for its group of two
    assert sampling_flops(along) - sampling_flops(apart) == p.token * tokens + p.pair * pairs + p.logits * 64
    assert scoring_flops(along) == p.logits * 64
    gpu, teacher = GPUS["H100-80GB"], along.follower("policy")
    rule = along.along("policy")
    alone = Datasheet(along, gpu).decoding([along.student], 2, 8, training=True)
    both = Datasheet(along, gpu).decoding([along.student], 2, 8, training=True, along=(teacher, rule))
    once = 4 * teacher.parameters / (0.6 * 1e9 * gpu.bandwidth) + 3 * OPERATIONS * LAUNCH  # three layers
    assert both.step - alone.step == pytest.approx(once / 4)
    assert both.row - alone.row == pytest.approx((p.token + p.logits) / (0.35 * 1e12 * gpu.single))


def test_reading_along_keeps_a_cache_and_every_state(data):
    method = {"name": "prune_opd", "k": 4, "adapt": False, "stop_every": 4}
    found = plan(parse_recipe(data | {"method": method}), timed=False)
    sample, teacher = parts(found.phases, "sample"), found.models["teacher"]
    assert sample["teacher hidden states of the step's samples"] == 8 * 8 * 32 * 4
    own = cache_bytes(teacher, 4, 8, found.counts.lengths, (4, 4), alone=True)
    assert (
        sample["teacher key-value cache of 8 rows"] == own == 3 * 2 * 16 * 4 * 8 * (4 + 64)
    )  # one head of 16, 3 layers
    assert sample["teacher reading 4 tokens along"] > 0
    score = parts(found.phases, "score")
    assert score["teacher hidden states"] == 64 * 32 * 4 and not any("forward pass" in what for what in score)
    apart = plan(parse_recipe(data | {"method": {k: v for k, v in method.items() if k != "stop_every"}}), timed=False)
    kept = [parts(f.phases, "update")["the teachers' views"] for f in (found, apart)]
    assert kept[0] - kept[1] == 64 * 32 * 4  # the states that the rollouts hold


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def test_responses_are_cut_into_turns():
    assert Lengths((4,), 12).cut(3) == [Lengths((4,), 4), Lengths((8,), 4), Lengths((12,), 4)]
    ending = Lengths((4,), 12, chance(6.0, 12)).cut(3)
    assert [piece.prompts for piece in ending] == [(4,), (6,), (8,)] and {piece.limit for piece in ending} == {4}
    assert [piece.response for piece in ending] == [pytest.approx(2.0)] * 3
    assert [piece.prompts for piece in Lengths((4,), 12, chance(6.0, 12)).cut(3, longest=True)] == [(4,), (8,), (12,)]
    assert len(Lengths((4,), 2).cut(5)) == 2 and Lengths((4,), 9).cut(1) == [Lengths((4,), 9)]


TOOLS = {"tools": {"environment": "calculator", "calls": "text", "turns": 2}}


def test_each_turn_reads_its_context_again(data):
    data["eval"]["teacher"] = False
    plain, tools = job(data), job(data, **TOOLS)
    p = Products.of(tools.student)
    read = p.token * 4 * (4 + 2 * 7) + p.pair * 4 * (10 + 2 * (7 * 4 + 28))
    assert sampling_flops(plain) == read + p.logits * 64
    # first turn: 4 prompts of 4 and 8 rows of 4 tokens; second: 8 contexts of 8 and 4 tokens behind each
    first = p.token * 4 * (4 + 2 * 3) + p.pair * 4 * (10 + 2 * (3 * 4 + 6))
    second = p.token * 8 * (8 + 3) + p.pair * 8 * (36 + 3 * 8 + 6)
    assert sampling_flops(tools) == first + second + p.logits * 64
    assert timed(tools)["sample"] == (2.0, 4) and timed(plain)["sample"] == (1.0, 4)  # a second for each call
    assert timed(tools)["evaluate"] == (2.0 + 2.0 + 4.0, 2)  # problems, samples for the exact KL, and that itself
    found = plan(parse_recipe(data | TOOLS), timed=False)
    assert (
        found.phases[0].bytes > plan(parse_recipe(data), timed=False).phases[0].bytes
    )  # longer prompts, one for each row
    assert any("every response is planned with 2 turns" in note for note in found.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Together, on this machine


@pytest.mark.parametrize("change", [
    {"method": composed(GIVEN.format(more=", assess=True")), "teachers": {"teacher": {"path": EMA}}},
    {"method": {"name": "effopd", "problems": 4, "tries": 1}},
    {"method": {"name": "prune_opd", "k": 4, "adapt": False, "stop_every": 2}},
    {"method": {"name": "grpo_opd"}, **TOOLS},
])  # fmt: skip
def test_all_of_it_is_timed(data, change):
    found = plan(parse_recipe(data | change), None, response=4.0)
    assert found.times and all(t.seconds > 0 for t in found.times)
    assert {"sample", "update"} <= {t.phase for t in found.times} and "most of the time: " in as_text(found)


@pytest.mark.parametrize("name", ["antisd", "effopd", "agent"])
def test_cpu_recipes_can_be_planned(name):
    found = plan(load_recipe(f"cpu/{name}"), "H100-80GB")
    assert not found.too_large and found.seconds > 0
