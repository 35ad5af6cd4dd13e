"""Planned time: lengths and products by hand, costs put together, what is timed is the engine, and the command."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from opdkit.cli import app
from opdkit.config import parse_recipe
from opdkit.plan import as_text, plan
from opdkit.plan.datasheet import LAUNCH, OPERATIONS
from opdkit.plan.hardware import Host
from opdkit.plan.passes import Pass, Products, passes, scoring_flops, updating_flops
from opdkit.plan.pilot import no_words, pilot, tried
from opdkit.plan.stopwatch import cut, shorter, through
from opdkit.plan.texts import Lengths, chance
from opdkit.plan.timing import Decoding, Timing, evaluations, timings
from opdkit.views.batches import Batch

# ---------------------------------------------------------------------------------------------------------------------
# Lengths


def test_lengths_by_hand():
    assert chance(1.0, 8) == pytest.approx(0.0, abs=1e-9) and chance(8.0, 8) == 1.0
    assert Lengths((3,), 2, 0.5).response == 1.5  # 1 + 1/2
    assert Lengths((3,), 40, chance(10.0, 40)).response == pytest.approx(10.0)
    both = Lengths((3, 5), 4, 0.5)
    assert (both.longest, both.prompt) == (5, 4.0)
    assert [both.alive(t) for t in range(5)] == [1.0, 0.5, 0.25, 0.125, 0.0]


def test_texts_are_spread_as_their_lengths_are():
    lengths = Lengths((2, 4, 6, 8), 50, chance(12.0, 50))
    texts = lengths.texts(200, 2)
    assert len(texts) == 400 and texts[0].prompt_ids == texts[1].prompt_ids != texts[2].prompt_ids
    assert sum(len(t.response_ids) for t in texts) / 400 == pytest.approx(12.0, rel=0.02)
    assert sorted({len(t.prompt_ids) for t in texts}) == [2, 4, 6, 8]
    assert {len(t.prompt_ids) for t in lengths.texts(3, 2, longest=True)} == {8}
    assert {len(t.response_ids) for t in Lengths((2,), 50).texts(3, 2)} == {50}


# ---------------------------------------------------------------------------------------------------------------------
# Products


def test_tokens_and_pairs_by_hand():
    texts = Lengths((3,), 3).texts(1, 2)  # two responses of 3 tokens, the last of which predicts nothing
    packed, padded = Pass(tuple(texts), True), Pass(tuple(texts), False)
    assert (packed.tokens, packed.pairs) == (3 + 2 * 2, 6 + 2 * (2 * 3 + 3))
    assert (padded.tokens, padded.pairs, padded.trained) == (10, 2 * 15, 6)
    assert (packed.ends, padded.ends) == (1 + 2 * 2, 6)


def test_products_are_those_that_a_pass_runs(recipe_data, student_path):
    found = plan(parse_recipe(recipe_data), None, timed=False)
    p = Products.of(found.models["student"])
    lm = pilot(found.job, 2**34).setup.student
    texts = found.counts.lengths.texts(2, 1, longest=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Batch((0, 1), False).states(lm, texts)
    one = Pass(tuple(texts), False)
    width, inner = 32, 64  # q, o, gate, up and down of the last of two layers run where they are read
    assert p.ends == 2 * (2 * width * width + 3 * width * inner)
    needed = p.token * one.tokens - p.ends * (one.tokens - one.trained)
    queries = one.longest + len(texts[0].response_ids)  # of the first layer and of the last, as batched products
    attention = 4 * (2 * 2 * 16) * queries * one.longest
    assert needed + attention == counter.get_total_flops()
    assert p.pair == 4 * 2 * 16 * 2 and p.logits == 2 * 44 * 32
    assert p.forward([one]) == needed + p.pair * one.pairs
    assert p.learning([one], False) == 3 * (p.forward([one]) + p.logits * one.trained)
    assert p.learning([one], True) - p.learning([one], False) == p.forward([one])


def test_minibatches_and_epochs_multiply_updates(recipe_data):
    recipe_data["method"] = {"name": "full_opd"}
    recipe_data["train"] |= {"prompts_per_step": 8, "packing": False}
    once = plan(parse_recipe(recipe_data), timed=False).job
    recipe_data["train"] |= {"minibatches": 2, "epochs": 3}
    again = plan(parse_recipe(recipe_data), timed=False).job
    assert scoring_flops(again) == scoring_flops(once)
    assert updating_flops(again) == pytest.approx(3 * updating_flops(once), rel=0.15)  # halves pad less


# ---------------------------------------------------------------------------------------------------------------------
# Putting costs together


def test_decoding_by_hand():
    cost = Decoding(call=100.0, prompt=1.0, step=10.0, row=2.0, pair=0.5, start=4.0)
    fixed = Lengths((4,), 3)  # two steps after the first token, at 5 and 6 tokens
    assert cost.wave(1, 2, fixed) == 100 + 4 + 2 * 10 + 2 * 2 * 2 + 0.5 * 2 * (1 + 2)
    assert cost.seconds(4, 2, 2, fixed) == 2 * cost.wave(1, 2, fixed)  # two waves of one prompt
    ending = Lengths((4,), 2, 0.5)  # one step: half of the rows, and with probability 3/4 any of them
    assert cost.wave(1, 2, ending) == 100 + 4 + 0.75 * 10 + 1 * (2 + 0.5)


def test_seconds_are_linear_in_flops():
    assert through([(10.0, 3.0), (20.0, 4.0)], 100.0) == pytest.approx(12.0)
    assert through([(10.0, 3.0), (20.0, 4.0)], 20.0) == 4.0  # the whole was timed
    assert through([(10.0, 3.0)], 30.0) == 9.0
    assert through([(10.0, 5.0), (20.0, 4.0)], 40.0) == 6.0  # at least half grows, whatever noise says
    assert through([(10.0, 1.0), (20.0, 4.0)], 40.0) == 8.0  # at most all of it


def test_evaluations_are_counted():
    assert [evaluations(10, None), evaluations(10, 5), evaluations(10, 4), evaluations(3, 5)] == [2, 3, 4, 2]


class Flat:
    """Costs of one second for everything."""

    def load(self):
        return 5.0

    def decoding(self, models, group, rows, *, training, along=None):
        return Decoding(1.0, 0.0, 0.0, 0.0, 0.0)

    def score(self):
        return 1.0

    def update(self):
        return 2.0

    def other(self):
        return 0.0

    def exact_kl(self, prompts):
        return float(prompts)


def test_a_run_is_the_sum_of_its_phases(recipe_data):
    recipe_data["train"] |= {"steps": 6}
    recipe_data["eval"] = {"every": 3, "kl_prompts": 4}
    job = plan(parse_recipe(recipe_data), timed=False).job
    found = {t.phase: (t.seconds, t.times) for t in timings(job, Flat())}
    assert found == {
        "load": (5.0, 1), "evaluate": (1.0 + 1.0 + 4.0, 3), "evaluate teacher": (1.0, 1), "sample": (1.0, 6),
        "score": (1.0, 6), "update": (2.0, 6),
    }  # fmt: skip
    assert Timing("x", 2.0, 3).total == 6.0


# ---------------------------------------------------------------------------------------------------------------------
# This machine


def test_a_pilot_is_the_recipes_run_with_other_weights(recipe_data):
    recipe_data["lora"] = {"rank": 2}
    recipe_data["teachers"]["teacher"]["path"] = "student:base"
    found = plan(parse_recipe(recipe_data), None, timed=False)
    made = pilot(found.job, 2**34)
    student, teacher = made.setup.student, made.setup.teachers["teacher"]
    assert sum(p.numel() for p in student.model.parameters() if p.requires_grad) == found.models["student"].trained
    assert teacher.model is student.model and not teacher.adapters.on and student.adapters.on
    assert made.depths == {"student": 1.0, "teacher": 1.0}
    assert pilot(found.job, 1000) is None  # nothing fits
    assert no_words().decode([1, 2], skip_special_tokens=True) == ""


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_tokenizers_need_not_be_here(recipe_data, tmp_path, lora):
    config = Path(recipe_data["student"]["path"], "config.json").read_text()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(config)
    recipe_data["student"]["path"] = str(tmp_path / "bare")
    recipe_data["teachers"]["teacher"]["path"] = str(tmp_path / "bare") if lora is None else "student:base"
    recipe_data["lora"] = lora
    found = plan(parse_recipe(recipe_data), None, response=3.0)
    assert found.counts.lengths.prompts == (128 - recipe_data["sampling"]["max_new_tokens"],)
    assert {"evaluate", "evaluate teacher", "sample", "score", "update"} <= {t.phase for t in found.times}


def test_packing_is_what_the_engine_does(recipe_data):
    found = plan(parse_recipe(recipe_data), None, timed=False)
    student = found.models["student"]
    assert student.packs and student.reads and tried(student, 2**34) == (True, True)
    texts = Lengths((100,), 60).texts(2, 4)  # 2 x (100 + 4 x 60) tokens in place of 8 x 160
    (one,) = passes(student, texts, 10_000)
    assert one.packed and one.tokens == 2 * (100 + 4 * 59)
    recipe_data["train"]["packing"] = False
    assert not plan(parse_recipe(recipe_data), None, timed=False).models["student"].packs
    assert not plan(parse_recipe(recipe_data)).models["student"].packs  # nor on a GPU


def test_parts_of_a_step_are_smaller_ones(recipe_data):
    recipe_data["method"] = {"name": "full_opd"}
    recipe_data["train"] |= {"prompts_per_step": 8, "minibatches": 2, "epochs": 2}
    job = plan(parse_recipe(recipe_data), timed=False).job
    part = cut(job, 2)
    assert part.counts.rollouts == {"policy": 2 * job.recipe.sampling.group}
    assert (part.recipe.train.minibatches, part.recipe.train.epochs) == (1, 1)
    assert shorter(job, {"student": 1.0, "teacher": 1.0}) is job  # small enough


OUTCOME = {"method": {"name": "grpo"}, "teachers": {}, "sampling": {"group": 2, "max_new_tokens": 6}}


@pytest.mark.parametrize("change", [{}, OUTCOME])
def test_a_plan_for_this_machine_has_a_time_for_every_phase(recipe_data, change):
    found = plan(parse_recipe(recipe_data | change), None, response=3.0)
    assert isinstance(found.place, Host) and found.response == 3.0
    phases = {t.phase for t in found.times}
    assert {"load", "evaluate", "sample", "update"} <= phases and all(t.seconds > 0 for t in found.times)
    assert found.seconds == pytest.approx(sum(t.seconds * t.times for t in found.times))
    text = as_text(found)
    assert "measured with random weights" in text and "if responses have 3 tokens on average" in text
    assert ("most of the time: " in text and "MiB free now" in text) or "GiB free now" in text


# ---------------------------------------------------------------------------------------------------------------------
# Named GPUs and the command


def test_a_gpus_time_follows_its_data_sheet(recipe_data):
    recipe_data["sampling"] = {"group": 4, "max_new_tokens": 40, "max_rows": 4}
    slow, fast = (plan(parse_recipe(recipe_data), name) for name in ("A100-80GB", "H100-80GB"))
    old, new = ({t.phase: t for t in p.times} for p in (slow, fast))
    assert old["score"].flops == new["score"].flops
    assert old["score"].seconds / new["score"].seconds == pytest.approx(67 / 19.5)  # float32
    assert new["sample"].seconds > 16 / 4 * 39 * 2 * OPERATIONS * LAUNCH  # waves x steps x layers
    assert plan(parse_recipe(recipe_data), "H100-80GB", response=10.0).seconds < fast.seconds
    text = as_text(fast)
    assert "estimated from its data sheet, never checked" in text and "most of the time: " in text
    assert "sampling.max_rows=16 in place of 4 would save about" in text


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_text_or_json(recipe_data, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(recipe_data))
    shown = run(str(tmp_path / "r.json"), "--gpu", "L40S-48GB", "--json", "train.steps=7")
    data = json.loads(shown.stdout)
    assert shown.exit_code == 0 and data["steps"] == 7 and data["place"]["name"] == "L40S-48GB"
    assert not data["time"]["measured"] and data["time"]["run_seconds"] > 0
    update = data["memory"]["update"]
    assert update["fits"] and update["bytes"] == sum(part["bytes"] for part in update["parts"])
    assert "memory of L40S-48GB at most" in run(str(tmp_path / "r.json"), "--gpu", "L40S-48GB").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "--gpus 2 has no effect without --gpu"),
        (["--gpu", "H100", "--gpus", "0"], "unknown GPU 'H100': did you mean 'H100-80GB'"),
        (["--gpu", "H100-80GB", "--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["--response", "0"], "--response 0: expected a mean length of 1 to sampling.max_new_tokens"),
        (["train.sharding=fsdp2"], "this machine is planned with one: name the GPUs"),
        (["student.path=nowhere/at-all"], "the configuration of student 'nowhere/at-all' is not here"),
    ],
)
def test_mistakes_are_one_line(recipe_data, tmp_path, arguments, message):
    (tmp_path / "r.json").write_text(json.dumps(recipe_data))
    done = run(str(tmp_path / "r.json"), *arguments)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_recipe_is_one_line():
    done = run("cpu/demos")
    assert done.exit_code == 2 and "no recipe file 'cpu/demos'" in done.stderr
