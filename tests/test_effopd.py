"""EffOPD: jumps along the weights' way, exact rollback, what a jump costs, and runs that go on in the middle of its life."""

import json
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import pytest
import torch
from test_loop import changed, metrics, run, same, weights

from opdkit.catalogue import build_method
from opdkit.config import parse_recipe
from opdkit.errors import MethodError, RecipeError
from opdkit.extrapolate import EffOPD, copy, place
from opdkit.hooks import Now
from opdkit.train.checks import check_processes
from opdkit.train.hooks import training_accuracy
from opdkit.train.processes import Processes
from opdkit.train.setup import set_up

KEY = "layer.mlp.up"


@dataclass
class Walk:
    """Weights that a fake training moves, and scores of them that are asked for."""

    score: object
    weights: dict = field(default_factory=lambda: {KEY: torch.zeros(3), "embed": torch.ones(2)})
    asked: list = field(default_factory=list)

    def now(self, step: int) -> Now:
        return Now(step, {}, self.weights, 100, self.accuracy)

    def accuracy(self, count: int) -> float:
        self.asked.append((count, self.score(self.weights)))
        return self.asked[-1][1]

    def train(self, hook: EffOPD, steps: int, move) -> list[dict]:
        state, logged = hook.init(self.now(0)), []
        for step in range(1, steps + 1):
            for w in self.weights.values():
                w += move
            state, numbers = hook.update(state, self.now(step))
            logged.append(numbers)
        return logged


# ---------------------------------------------------------------------------------------------------------------------
# The jump


def test_the_released_recursion_visits_our_candidates():
    """W <- W + a (W - R), a <- a / (1 + a) from a = 2: R + (3, 5, 7, 9, 11) Delta (identity 1)."""
    torch.manual_seed(0)
    r, delta = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    w, a = r + delta, 2.0
    for k in range(1, 6):
        w, a = w + a * (w - r), a / (1 + a)
        ours = {KEY: torch.empty_like(w)}
        place(ours, {KEY: r + delta}, {KEY: r}, 2.0 * k)
        assert (ours[KEY] - (r + (2 * k + 1) * delta)).abs().max() < 1e-13
        assert (ours[KEY] - w).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("optimum", "accepted", "scored"), [(11.0, 5, 5), (9.4, 4, 5), (7.0, 3, 4), (3.2, 1, 2), (1.9, 0, 1)]
)
def test_on_a_line_towards_the_optimum_the_last_point_before_the_drop_is_kept(optimum, accepted, scored):
    """From R = 0 to W = 1, candidates 3, 5, 7, 9, 11 of -(w - optimum)^2 (identity 4)."""
    walk = Walk(lambda w: float(-((w[KEY][0] - optimum) ** 2)))
    (logged,) = walk.train(EffOPD(problems=7), 1, 1.0)
    assert logged["accepted"] == accepted and logged["responses"] == 7 * (1 + scored)
    assert walk.weights[KEY].tolist() == [1.0 + 2 * accepted] * 3 and walk.weights["embed"].tolist() == [2.0, 2.0]
    assert [count for count, _ in walk.asked] == [7] * (1 + scored)
    taken = [score for _, score in walk.asked][: accepted + 1]
    assert taken == sorted(set(taken)) and logged["score_before"] == taken[0] and logged["score"] == taken[-1]


def test_it_jumps_at_powers_of_two_from_where_it_last_stood():
    """Each step moves by 1, every jump is k = 1 by 2 Delta: steps since the last jump, tripled."""
    at = {"last": 0.0}

    def one_more(w):  # a second candidate never is better
        value = float(w[KEY][0])
        at["calls"] = at.get("calls", 0) + 1
        return {0: 0.0, 1: 1.0, 2: 0.5}[(at["calls"] - 1) % 3] if value else 0.0

    walk = Walk(one_more)
    hook, seen = EffOPD(), []
    state = hook.init(walk.now(0))
    for step in range(1, 9):
        walk.weights[KEY] += 1
        state, numbers = hook.update(state, walk.now(step))
        seen.append((float(walk.weights[KEY][0]), "accepted" in numbers))
    # 1 -> 3; 3 + 1 -> 6; 6 + 2 -> 12; 12 + 4 -> 24
    assert seen == [(3, True), (6, True), (7, False), (12, True), (13, False), (14, False), (15, False), (24, True)]
    assert state["reference"][KEY].tolist() == [24.0] * 3


def test_the_papers_reading_counts_the_last_jump_too():
    walk = Walk(lambda w: 0.0)
    walk.train(EffOPD(accept="always", tries=1, reference="trained"), 2, 1.0)
    # step 1: W = 1, R = 0 -> 3; step 2: W = 4, R = 1 -> 4 + 2 * 3
    assert walk.weights[KEY].tolist() == [10.0] * 3
    released = Walk(lambda w: 0.0)
    released.train(EffOPD(accept="always", tries=1), 2, 1.0)
    assert released.weights[KEY].tolist() == [6.0] * 3 and released.asked == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "score", [lambda n: -n, lambda n: 0.0, lambda n: nan if n else 0.5], ids=["worse", "tie", "nan"]
)
def test_a_rejected_jump_leaves_every_bit(dtype, score):
    torch.manual_seed(0)
    own = {KEY: torch.randn(50, dtype=dtype), "norm": torch.randn(50, dtype=dtype)}
    calls = iter(range(9))
    walk = Walk(lambda w: float(score(next(calls))), own)
    hook = EffOPD(moved="all")
    state = hook.init(walk.now(0))
    for w in own.values():
        w += 0.3
    before = copy(own)
    state, numbers = hook.update(state, walk.now(1))
    assert numbers["accepted"] == 0 and same(own, before) and same(state["reference"], before)
    assert len(walk.asked) == 2


def test_ties_pass_only_where_the_paper_says_so():
    for accept, accepted in (("better", 0), ("no_worse", 5)):
        (logged,) = Walk(lambda w: 0.5).train(EffOPD(accept=accept), 1, 1.0)
        assert logged["accepted"] == accepted


def test_arithmetic_is_in_float32():
    """1 + 2^-7 is the next number after 1 in bfloat16; 3 steps of it, rounded once."""
    r, w = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1 + 2**-7, dtype=torch.bfloat16)
    out = {KEY: torch.zeros(1, dtype=torch.bfloat16)}
    place(out, {KEY: w}, {KEY: r}, 2.0)
    assert out[KEY].item() == 1 + 3 * 2**-7


def test_copies_are_not_the_parameters():
    p = {KEY: torch.zeros(2)}
    kept = copy(p)
    p[KEY] += 1
    assert kept[KEY].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"problems": 0}, "at least 1 problem"),
        ({"stride": 0.0}, "a stride above 0"),
        ({"tries": -1}, "at least 0 tries"),
        ({"accept": "always", "problems": 10}, "scores nothing"),
        ({"accept": "always", "tries": 0}, "scores nothing"),
    ],
)
def test_settings_that_make_no_sense(arguments, text):
    with pytest.raises(MethodError, match=text):
        build_method("effopd", arguments)


def test_what_a_run_lacks_is_said_at_its_start(recipe_data, student_path):
    with pytest.raises(RecipeError, match="scores on 50 training problems, but there are 28"):
        run(recipe_data, method={"name": "effopd"})
    with pytest.raises(
        RecipeError, match=r"learns from rewards, but task 'sums\.jsonl' has no verifier|has no verifier"
    ):
        set_up(parse_recipe(changed(recipe_data, method={"name": "effopd", "problems": 8}, task__verifier="none")))
    with pytest.raises(RecipeError, match="no trained parameter has attn"):
        EffOPD().init(Now(0, {}, {"embed": torch.zeros(1)}, 100, float))
    two = Processes(0, 2, torch.device("cpu"))
    recipe = parse_recipe(changed(recipe_data, train__sharding="fsdp2"))
    with pytest.raises(RecipeError, match=r"divides the student, and EffOPD\(problems=8\) moves its weights whole"):
        check_processes(recipe, build_method("effopd", {"problems": 8}), two)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


EFFOPD = {"name": "effopd", "problems": 8}


def test_without_a_passing_candidate_it_is_plain_opd_bit_for_bit(recipe_data, tmp_path):
    """The tiny student solves nothing, so no candidate is better (identity 2); the scoring uses no random number of the
    training, dropout's included."""
    quick = {"eval__kl_prompts": 0, "eval__teacher": False, "train__prompts_per_step": 2}
    lora = {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1}}
    for name, extra in (("whole", quick), ("lora", quick | lora)):
        plain = run(recipe_data, output=str(tmp_path / name / "opd"), **extra)
        for number, arguments in enumerate([{"tries": 0}, {}]):
            path = run(recipe_data, method={**EFFOPD, **arguments}, output=str(tmp_path / name / str(number)), **extra)
            assert same(stored(path), stored(plain))
            jumped = [row["step"] for row in metrics(path) if "jump/accepted" in row]
            assert jumped == ([1, 2, 4] if number else [])
            assert [row["loss"] for row in metrics(path)] == [row["loss"] for row in metrics(plain)]
    row = metrics(path)[3]
    assert row["jump/accepted"] == row["jump/score"] == row["jump/score_before"] == 0.0
    assert row["jump/responses"] == 16 and 0 < row["jump/seconds"] < row["seconds/other"]


def stored(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from opdkit.train.checkpoint import latest_checkpoint

    newest = latest_checkpoint(path)
    assert newest is not None
    return load_file(next(newest.glob("*model.safetensors")))


def test_a_run_that_goes_on_between_or_right_after_jumps_equals_one_in_one_piece(recipe_data, tmp_path):
    method = {**EFFOPD, "accept": "no_worse", "tries": 2, "stride": 0.5}
    settings = {"method": method, "eval__kl_prompts": 0, "eval__teacher": False, "train__prompts_per_step": 2}
    whole = run(recipe_data, train__steps=5, output=str(tmp_path / "whole"), **settings)
    for until in (3, 4):
        output = str(tmp_path / str(until))
        run(recipe_data, train__steps=until, output=output, **settings)
        part = run(recipe_data, train__steps=5, output=output, resume=True, **settings)
        assert same(weights(whole), weights(part))
        assert [row["loss"] for row in metrics(whole)] == [row["loss"] for row in metrics(part)]
        jumps = [(row["step"], row["jump/accepted"]) for row in metrics(part) if "jump/accepted" in row]
        assert jumps == [(1, 2), (2, 2), (4, 2)]


def test_only_attention_and_mlp_weights_are_moved(recipe_data, tmp_path):
    method = {"name": "effopd", "accept": "always", "tries": 1}
    jumped = weights(run(recipe_data, method=method, train__steps=1, output=str(tmp_path / "a")))
    plain = weights(run(recipe_data, train__steps=1, output=str(tmp_path / "b")))
    start = {name: p for name, p in set_up(parse_recipe(recipe_data)).student.model.named_parameters()}
    differ = {name for name in plain if not torch.equal(plain[name], jumped[name])}
    named = {name for name in plain if "attn" in name or "attention" in name or "mlp" in name}
    assert differ == named and "model.layers.0.post_attention_layernorm.weight" in named  # as released
    name = "model.layers.0.mlp.up_proj.weight"
    expected = plain[name] + 2.0 * (plain[name] - start[name].detach())
    assert torch.equal(jumped[name], expected)


def test_a_jump_does_not_move_the_reference_of_an_extrapolated_reward(recipe_data, monkeypatch):
    """In the released code the displacement's start and G-OPD's reference are one module; here they are two."""
    from opdkit.train import loop

    seen, real = [], loop.make_step

    def noted(setup, *rest):
        seen.append({name: p.detach().clone() for name, p in setup.teachers["reference"].model.named_parameters()})
        return real(setup, *rest)

    monkeypatch.setattr(loop, "make_step", noted)
    method = {"name": "compose", "base": {"name": "gopd"}, "after_update": ["EffOPD(accept='always', tries=1)"]}
    path = run(recipe_data, method=method, teachers__reference={"path": "student:base"}, train__steps=3)
    assert [row.get("jump/accepted") for row in metrics(path)] == [1, 1, None] and len(seen) == 3
    assert all(same(seen[0], later) for later in seen[1:])
    start = dict(set_up(parse_recipe(recipe_data)).student.model.named_parameters())
    assert all(torch.equal(start[name], p) for name, p in seen[2].items())


def test_adapters_are_the_parameters_under_lora(recipe_data):
    method = {"name": "effopd", "accept": "always", "tries": 1}
    path = run(recipe_data, method=method, lora={"rank": 2, "alpha": 4.0}, train__steps=2)
    from opdkit.train.checkpoint import latest_checkpoint, load_checkpoint

    newest = latest_checkpoint(path)
    assert newest is not None
    reference = load_checkpoint(newest)["method"]["jump"]["reference"]
    assert reference and all("lora_" in name for name in reference)
    expected = {f"base_model.model.{name.replace('.default', '')}": p for name, p in reference.items()}
    assert same(stored(path), expected)


def test_accuracy_on_training_problems_is_the_same_every_time_and_nan_where_it_is_not_known(recipe_data):
    setup = set_up(parse_recipe(changed(recipe_data, method=EFFOPD)))
    state = torch.get_rng_state()
    assert training_accuracy(setup, 8) == training_accuracy(setup, 8)
    assert torch.equal(torch.get_rng_state(), state)
    next(iter(setup.student.model.parameters())).data.fill_(nan)
    assert json.dumps(training_accuracy(setup, 8)) == "NaN"
