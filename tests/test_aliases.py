"""Other systems' names: what they become, who wins, what is refused, and peers' recipes that run unchanged in meaning."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from synthetic import logit_gradient, logits, make_step
from typer.testing import CliRunner

from opdkit.aliases import translate
from opdkit.aliases.given import own_default
from opdkit.aliases.joint import JOINT
from opdkit.aliases.table import known_names, look_up, meanings, peers
from opdkit.aliases.values import MISSING, SINGLE
from opdkit.catalogue import build_method, method_function, method_names
from opdkit.cli import app
from opdkit.config import Recipe, load_recipe, parse_recipe, recipe_data
from opdkit.errors import RecipeError
from opdkit.fields import fields
from opdkit.losses import ClippedPolicyGradient, Divergence
from opdkit.method import Method, Term, View
from opdkit.signals import log_ratio
from opdkit.sources import Dataset, OnPolicy
from opdkit.support import Full, Sampled, TopK

OURS = {
    "method": {"name": "opd"},
    "student": {"path": "s"},
    "teachers": {"teacher": {"path": "t"}},
    "task": {"kind": "testbed", "name": "sums"},
}
TRL = {"peer": "trl-gkd", "model_name_or_path": "s", "teacher_model_name_or_path": "t", "dataset_name": "testbed:sums"}
VERL_LOSS = "distillation.distillation_loss"


def ours(data: dict, **pairs) -> dict:
    """The dotted settings of a translated recipe."""
    return dict(_flat(translate(data, pairs).data))


def _flat(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def wrong(data: dict, **pairs) -> str:
    with pytest.raises(RecipeError) as error:
        translate(data, pairs)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- the tables


def test_every_target_is_a_setting_of_ours():
    known = {name for name, *_ in fields()} | {"lora", "method.name"}
    arguments = {f"method.{a}" for name in method_names() for a in method_function(name).__annotations__}
    for m in meanings():
        for target in m.to:
            section = target.removesuffix(".*")
            named = section.replace("teachers.teacher", "teachers.NAME").replace("teachers.reference", "teachers.NAME")
            below = target.startswith(("task.columns.", "task.template_args."))
            fits = {named, *(k for k in known if k.startswith(f"{named}."))} & known
            assert target == "rule" or below or fits or target in arguments, (m.names, target)


def test_every_entry_of_the_tables_is_complete():
    for m in meanings():
        assert m.how in SINGLE or m.how in JOINT, m.names
        assert set(m.of) <= {*peers(), "any"}, (m.names, m.of)
        assert bool(m.to) + bool(m.refuse) + bool(m.ignore) == 1 and m.says, m.names
    for peer in peers().values():
        assert peer.refuse or peer.rules
        for name in [*peer.defaults, *(n for r in peer.rules for n in (*r.when, *r.passed))]:
            assert look_up(name, peer.name) and look_up(name, peer.name)[0].names.count(name), (peer.name, name)
        assert {r.method for r in peer.rules if r.method} <= set(method_names()), peer.name


def test_every_rule_sets_arguments_that_its_method_has():
    for peer in peers().values():
        for rule in (r for r in peer.rules if r.method):
            arguments = method_function(rule.method).__annotations__
            for key in rule.settings:
                assert not key.startswith("method.") or key.removeprefix("method.") in arguments, (peer.name, key)
            for name in rule.passed:
                targets = [t for t in look_up(name, peer.name)[0].to if t.startswith("method.")]
                assert all(t.removeprefix("method.") in arguments for t in targets), (peer.name, rule.method, name)


def test_no_name_of_theirs_hides_a_setting_of_ours():
    """A key inside one of our sections is ours first; in `method` the arguments' names are free."""
    arguments = {a for name in method_names() for a in method_function(name).__annotations__}
    theirs = {n for m in meanings() for n in m.spellings if f"method.{n}" not in m.to
              if any(t.startswith("method.") for t in m.to)}  # fmt: skip
    assert not arguments & theirs


def test_conventions_that_users_expect_are_known():
    wanted = (
        "lmbda beta sft_alpha temperature top_p num_generations max_completion_length max_new_tokens max_prompt_length "
        "loss_top_k gkd_logits_topk topk_logits_k distillation_topk loss_add_tail teacher_model_name_or_path "
        "teacher_model_server_url teacher_server_urls teacher_model_init_kwargs teacher_deepspeed use_vllm vllm_mode "
        "opd_kl_coef kl_penalty_coef teacher_kl_coef distill_loss_weight rl_loss_weight teacher_model_kind "
        "teacher_update_freq vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_server_base_url "
        "distillation_alpha jsd_beta lora_r "
        f"{VERL_LOSS}.distillation_loss_coef {VERL_LOSS}.topk"
    )
    assert set(wanted.split()) <= set(known_names(None))


# ------------------------------------------------------------------------------------------------------ translation


def test_a_recipe_in_our_names_is_left_as_it_is():
    got = translate(OURS, {"train.steps": 3})
    assert (got.data, got.pairs, got.lines) == (OURS, {"train.steps": 3}, ())


def test_a_name_and_its_line():
    got = translate(
        {**OURS, "method": {"name": "gkd", "lmbda": 0.25}, "num_generations": 4, "optim": {"learning_rate": "1e-4"}}
    )
    assert got.data["method"] == {"name": "gkd", "on_policy_share": 0.25}
    assert (got.data["sampling"], got.data["optim"]) == ({"group": 4}, {"lr": 1e-4})
    assert got.lines[0] == (
        "lmbda: 0.25 -> method.on_policy_share: 0.25 (share of on-policy batches; here a share of each step's prompts)"
    )


def test_one_name_with_a_meaning_for_each_peer():
    assert ours({**TRL, "beta": 0.3})["method.mix"] == 0.3
    grpo = {"peer": "trl-grpo", "model_name_or_path": "s", "dataset_name": "testbed:sums", "beta": 0.3}
    got = ours(grpo)
    assert (got["method.name"], got["method.kl_coef"], got["teachers.reference.path"]) == ("grpo", 0.3, "student:base")
    kdflow = {"peer": "kdflow", "student_name_or_path": "s", "kd_loss_fn": "jsd", "kd_ratio": 1.0, "jsd_beta": 0.3}
    assert ours(kdflow)["method.mix"] == 0.7  # theirs is the student's share
    text = wrong({**OURS, "beta": 0.3})
    assert (
        "means different things" in text
        and "teacher's share" in text
        and "reference model" in text
        and "peer: NAME" in text
    )


def test_what_a_peer_takes_for_names_that_are_left_out():
    got = translate(TRL)
    assert ours(TRL)["optim.lr"] == 2e-5 and ours(TRL)["train.precision"] == "bf16"
    assert ours(TRL)["sampling.max_new_tokens"] == 128 and ours(TRL)["train.prompts_per_step"] == 8
    assert "left out, trl-gkd's default: lr_scheduler_type: linear -> optim.schedule: linear" in "\n".join(got.lines)
    assert ours(TRL, **{"optim.lr": 1e-3}).get("optim.lr") is None  # the command line has it
    assert ours({**TRL, "optim": {"lr": 1e-3}})["optim.lr"] == 1e-3
    assert "optim.weight_decay" not in ours(TRL) and own_default("optim.weight_decay") == 0.0  # ours is the same


def test_trl_grpo_counts_responses():
    data = {"peer": "trl-grpo", "model_name_or_path": "s", "dataset_name": "testbed:sums", "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4, "num_processes": 2, "num_generations": 8, "max_steps": 100}  # fmt: skip
    got = ours(data)
    assert (got["train.prompts_per_step"], got["train.minibatches"], got["train.steps"]) == (4, 1, 100)
    got = ours({**data, "steps_per_generation": 8, "num_iterations": 2})  # 64 responses serve 2 x 2 updates of 32
    assert (got["train.prompts_per_step"], got["train.minibatches"], got["train.epochs"]) == (8, 2, 2)
    assert got["train.steps"] == 25
    assert ours({**data, "loss_type": "dr_grpo"})["train.reduction"] == "seq_mean_token_sum_norm"
    assert "not a multiple of 8" in wrong({**data, "per_device_train_batch_size": 1, "num_processes": 1})


def test_epochs_need_the_number_of_problems():
    data = {**TRL, "num_train_epochs": 3, "per_device_train_batch_size": 4}
    assert "give task.train_size" in wrong(data)
    assert ours({**data, "task": {"train_size": 10}})["train.steps"] == 8  # ceil(30 / 4)
    assert ours({**data, "task": {"train_size": 10}}, max_steps=5)["train.steps"] == 5
    assert ours({**TRL, "max_steps": 50, "warmup_ratio": 0.1})["optim.warmup_steps"] == 5
    left_out = "note: trl-gkd's default num_train_epochs: 3 is not taken (epochs need the number of problems"
    assert any(line.startswith(left_out) for line in translate(TRL).lines)
    assert ours({**TRL, "task": {"train_size": 24}})["train.steps"] == 9  # three epochs of three steps
    assert not any("num_train_epochs" in line for line in translate({**TRL, "train": {"steps": 7}}).lines)


@pytest.mark.parametrize(("mode", "estimator"), [("k3", "k3"), ("low_var_kl", "k3"), ("mse", "k2"), ("abs", "abs")])
def test_verl_estimators_that_are_differentiated(mode, estimator):
    loss = {"loss_mode": mode, "use_task_rewards": False}
    data = {"peer": "verl", "distillation": {"enabled": True, "distillation_loss": loss,
            "teacher_models": {"any": {"model_path": "t"}}}}  # fmt: skip
    got = ours(data)
    assert (got["method.name"], got["method.estimator"]) == ("sampled_kl", estimator)


def test_verl_cuts_a_rollout_batch_into_updates():
    data = {"peer": "verl", "data": {"train_files": "x.parquet", "train_batch_size": 64},
            "actor_rollout_ref": {"model": {"path": "s"}, "actor": {"ppo_mini_batch_size": 16, "clip_ratio": 0.1,
            "clip_ratio_high": 0.3}}, "algorithm": {"adv_estimator": "grpo"}}  # fmt: skip
    got = ours(data)
    assert (got["train.prompts_per_step"], got["train.minibatches"]) == (64, 4)
    assert (got["method.name"], got["method.low"], got["method.high"], got["method.dual"]) == ("grpo", 0.1, 0.3, 3.0)
    assert (got["task.kind"], got["task.path"], got["task.format"]) == ("file", "x.parquet", "verl")
    data["distillation"] = {"enabled": True, "teacher_models": {"any": {"model_path": "t"}},
                            "distillation_loss": {"loss_mode": "k1", "use_policy_gradient": True}}  # fmt: skip
    got = ours(data)
    assert (got["method.name"], got["method.how"], got["method.opd_coef"]) == ("grpo_opd", "terms", 1.0)
    assert got["teachers.teacher.path"] == "t"
    data["distillation"]["distillation_loss"] = {"loss_mode": "k1"}
    assert "cannot see the teacher" in wrong(data)
    del data["actor_rollout_ref"]["actor"]
    data["distillation"]["distillation_loss"] = {"loss_mode": "forward_kl_topk", "use_task_rewards": False, "topk": 9,
                                                 "loss_max_clamp": 10.0}  # fmt: skip
    got = ours(data)
    assert (got["method.name"], got["method.k"], got["method.row_max"], got["method.tail"]) == (
        "topk_kl",
        9,
        10.0,
        "raw",
    )


def test_adapters():
    swift = {"peer": "ms-swift-gkd", "model": "s", "teacher_model": "t", "dataset": "testbed:sums"}
    got = ours(swift)
    assert (got["lora.rank"], got["lora.alpha"], got["lora.dropout"], got["optim.lr"]) == (8, 32.0, 0.05, 1e-4)
    full = ours({**swift, "tuner_type": "full"})
    assert full.get("optim.lr", own_default("optim.lr")) == 1e-5 and not any(key.startswith("lora") for key in full)
    assert ours({**swift, "target_modules": "q_proj v_proj"})["lora.targets"] == ["q_proj", "v_proj"]
    assert ours({**TRL, "use_peft": True, "lora_r": 4})["lora.rank"] == 4
    assert "expected use_peft true" in wrong({**TRL, "lora_r": 4})
    assert wrong({**swift, "lora": None, "lora_rank": 4}).endswith(
        "but the recipe also says lora.rank: null; give one of them"
    )


def test_the_batch_of_ms_swift_is_16_unless_it_is_said():
    swift = {"peer": "ms-swift-gkd", "model": "s", "teacher_model": "t", "dataset": "testbed:sums"}
    assert parse_recipe(translate(swift).data).train.prompts_per_step == 16
    assert ours({**swift, "per_device_train_batch_size": 5})["train.prompts_per_step"] == 20  # ceil(16 / 5) x 5
    assert ours({**swift, "gradient_accumulation_steps": 2})["train.prompts_per_step"] == 2


# -------------------------------------------------------------------------------------------- who wins, and conflicts


def test_the_command_line_beats_the_file_in_anyones_names():
    data = {**TRL, "max_new_tokens": 64, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert ours(data, max_completion_length=32)["sampling.max_new_tokens"] == 32
    assert ours(data, gradient_accumulation_steps=4)["train.prompts_per_step"] == 32
    assert ours({**data, "sampling": {"max_new_tokens": 64}}, max_new_tokens=16)["sampling.max_new_tokens"] == 16
    got = translate(data, {"sampling.max_new_tokens": 8})
    assert got.pairs == {"sampling.max_new_tokens": 8} and "max_new_tokens" not in got.data["sampling"]
    assert ours(data, peer="trl-gold")["sampling.top_p"] == 0.95


@pytest.mark.parametrize(
    ("change", "pairs", "words"),
    [
        ({"lmbda": 0.5, "method": {"name": "gkd", "on_policy_share": 0.2}}, {}, ["lmbda: 0.5", "on_policy_share: 0.2"]),
        ({"max_new_tokens": 5, "max_completion_length": 6}, {}, ["two spellings of one setting"]),
        ({}, {"beta": 0.5, "method.mix": 0.1}, ["'beta: 0.5' means method.mix: 0.5", "0.1"]),
        ({}, {"lr": 1.0, "learning_rate": 2.0}, ["two spellings"]),
        ({"lmbda": "often"}, {}, ["'lmbda: often': expected a number between 0 and 1"]),
        ({"lmbda": 1.5}, {}, ["between 0 and 1"]),
        ({"beta": True}, {}, ["'beta: true'"]),
        ({"temperature": 0}, {}, ["above 0"]),
        ({"per_device_train_batch_size": 1.5}, {}, ["expected a whole number"]),
        ({"lr_scheduler_type": "cosine_with_restarts"}, {}, ["expected linear, cosine, constant"]),
        ({"save_strategy": "epoch"}, {}, ["expected strategy steps or no"]),
        ({"report_to": "swanlab"}, {}, ["swanlab is not here"]),
        ({"lmbdaa": 0.5}, {}, ["unknown key 'lmbdaa': did you mean 'lmbda'"]),
        ({"xyzzyx": 0.5}, {}, ["unknown key 'xyzzyx'; known: ", "and the names of trl-gkd"]),
        ({"opd_kl_coef": 0.5}, {}, ["'opd_kl_coef' is not a name of trl-gkd; slime use it"]),
        ({"peer": "trl-gdk"}, {}, ["'trl-gdk' is not a system", "did you mean 'trl-gkd'"]),
        ({"peer": 3}, {}, ["not a system"]),
        ({"peer": "trl-sdft"}, {}, ["privileged context is not here"]),
        ({"use_vllm": True}, {}, ["'use_vllm: true'", "in this process"]),
        ({"teacher_model_server_url": "http://x"}, {}, ["behind a server is not here"]),
        ({"deepspeed": "zero3"}, {}, ["fsdp2"]),
        ({"optim": "adafactor"}, {}, ["the optimiser is AdamW"]),
        ({"seq_kd": True}, {}, ["method.name: seqkd"]),
        ({"model_name_or_path": "${HOME}/x"}, {}, ["references to other settings are not resolved"]),
        ({"dataset_name": ["a", "b"]}, {}, ["several in one run are not here"]),
        ({"fp16": "yes please"}, {}, ["expected true or false"]),
        ({"max_steps": "many"}, {}, ["expected a number"]),
    ],
    ids=lambda x: json.dumps(x)[:50] if isinstance(x, dict) else "",
)  # fmt: skip
def test_conflicts_and_wrong_values(change, pairs, words):
    text = wrong({**TRL, **change}, **pairs)
    assert all(word in text for word in words) and "\n" not in text, text


def test_a_name_that_the_chosen_method_does_not_read_is_an_error():
    slime = {"peer": "slime", "hf_checkpoint": "s", "opd_teacher_load": "t", "prompt_data": "x.jsonl", "use_opd": True}
    assert ours(slime)["method.name"] == "opd"
    assert "'entropy_coef: 0.3' has no effect on opd" in wrong({**slime, "entropy_coef": 0.3})
    assert ours({**slime, "entropy_coef": 0.0})["method.name"] == "opd"  # slime's own default changes nothing
    got = ours({**slime, "rm_type": "math", "opd_kl_coef": 0.5, "eps_clip": 0.3})
    assert (got["method.name"], got["method.opd_coef"], got["method.low"], got["method.high"]) == (
        "grpo_opd",
        0.5,
        0.3,
        0.3,
    )
    areal = {"peer": "areal", "actor": {"path": "s"}, "teacher": {"path": "t", "rl_loss_weight": 0.5}}
    assert "cannot see the teacher" in wrong(areal)


def test_a_name_that_chooses_a_method_needs_its_peer():
    assert "say whose name it is with `peer: slime`" in wrong({**OURS, "use_opd": True})


def test_a_method_of_ours_in_a_peers_recipe_stays():
    got = ours({**TRL, "method": {"name": "vopd"}, "lmbda": 1.0})
    assert got["method.name"] == "vopd" and got["method.on_policy_share"] == 1.0  # the method itself will refuse that


def test_ignored_and_noted():
    lines = translate({**TRL, "logging_steps": 10, "temperature": 0.9}).lines
    assert any(line.startswith("ignored: logging_steps: 10 (metrics.jsonl") for line in lines)
    assert any(line.startswith("note: temperature: TRL's GKD samples at this temperature") for line in lines)
    assert not any(line.startswith("note: temperature") for line in translate({**TRL, "temperature": 1.0}).lines)


# ---------------------------------------------------------------------------------------------------- the command line


def test_the_translation_is_printed_on_stderr(tmp_path):
    path = tmp_path / "trl.yaml"
    path.write_text(yaml.safe_dump({**TRL, "lmbda": 0.5, "bf16": False}))
    done = CliRunner().invoke(app, ["translate", str(path), "beta=0.1"])
    assert done.exit_code == 0, done.stderr
    data = yaml.safe_load(done.stdout)
    assert parse_recipe(data) == load_recipe(str(path), ["beta=0.1"]) and data["method"]["mix"] == 0.1
    assert (
        "lmbda: 0.5 -> method.on_policy_share: 0.5 (share" in done.stderr
        and "beta: 0.1 -> method.mix: 0.1" in done.stderr
    )
    done = CliRunner().invoke(app, ["translate", str(path), "lmbda=3"])
    assert done.exit_code == 2 and done.stderr.startswith("error: 'lmbda: 3': expected a number between 0 and 1")


# ------------------------------------------------------------------------------------- recipes of peers, same meaning

JSD = Divergence("jsd", mix=0.5)
COMMON = {
    "student": {"path": "testbed:student"},
    "task": {"kind": "testbed", "name": "sums", "settings": {"format": "a"}, "eval_size": 50},
}


def by_hand(**sections) -> Recipe:
    return parse_recipe({**COMMON, "teachers": {"teacher": {"path": "testbed:sft"}}, **sections})


PEERS = {
    "trl-gkd": (
        by_hand(
            method={"name": "gkd", "mix": 0.5, "on_policy_share": 0.5}, sampling={"max_new_tokens": 24},
            optim={"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2}, train={"steps": 20, "prompts_per_step": 16},
            log={"trackers": []}, output="runs/peers-trl-gkd",
        ),
        Method(
            name="gkd", rollouts={"policy": OnPolicy(0.5), "data": Dataset(0.5)}, views={"teacher": View("teacher", Full())},
            terms=(Term(loss=JSD, coef=0.5, on="policy"), Term(loss=JSD, coef=0.5, on="data")),
        ),
    ),
    "trl-distillation": (
        by_hand(
            method={"name": "gkd", "mix": 1.0, "on_policy_share": 1.0}, sampling={"max_new_tokens": 24, "temperature": 0.8},
            teachers={"teacher": {"path": "testbed:sft", "temperature": 0.8}}, optim={"lr": 1e-3},
            train={"steps": 20, "prompts_per_step": 16, "gradient_checkpointing": True}, output="runs/peers-trl-distillation",
        ),
        Method(
            name="gkd", rollouts={"policy": OnPolicy(1.0)}, views={"teacher": View("teacher", Full())},
            terms=(Term(loss=Divergence("reverse_kl")),),
        ),
    ),
    "verl-opd": (
        by_hand(
            method={"name": "opd", "low": 0.2, "high": 0.2, "dual": 3.0}, sampling={"group": 2, "max_new_tokens": 24},
            task={**COMMON["task"], "max_prompt_tokens": 64, "overlong": "drop"},
            optim={"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.01}, eval={"every": 10}, log={"trackers": []},
            train={"steps": 20, "prompts_per_step": 16, "microbatch_tokens": 8192, "reduction": "token_mean"},
            output="runs/peers-verl-opd",
        ),
        Method(
            name="opd", views={"teacher": View("teacher", Sampled())},
            terms=(Term(loss=ClippedPolicyGradient(0.2, 0.2, 3.0), signal=log_ratio(num="teacher", den="student")),),
        ),
    ),
    "ms-swift-gkd": (
        by_hand(
            method={"name": "topk_kl", "k": 8, "of": "teacher", "tail": "renormalise"},
            sampling={"max_new_tokens": 24, "temperature": 0.9},
            teachers={"teacher": {"path": "testbed:sft", "temperature": 0.9}},
            optim={"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
            train={"steps": 20, "prompts_per_step": 16, "checkpoint_every": 10}, output="runs/peers-ms-swift-gkd",
        ),
        Method(
            name="topk_kl", views={"teacher": View("teacher", TopK(8, "teacher"))},
            terms=(Term(loss=Divergence("reverse_kl", tail="renormalise")),),
        ),
    ),
}  # fmt: skip
SMALLER = {
    "trl-gkd": ["model_name_or_path={s}", "teacher_model_name_or_path={t}", "dataset_name={d}", "max_steps=2",
                "per_device_train_batch_size=2", "max_new_tokens=8", "output_dir={o}"],
    "trl-distillation": ["model_name_or_path={s}", "teacher_model_name_or_path={t}", "dataset_name={d}", "max_steps=2",
                         "per_device_train_batch_size=4", "max_completion_length=8", "output_dir={o}"],
    "verl-opd": ["actor_rollout_ref.model.path={s}", "distillation.teacher_models.teacher_model.model_path={t}",
                 "task.kind=file", "task.path={d}", "data.train_files=null", "data.train_batch_size=4",
                 "actor_rollout_ref.actor.ppo_mini_batch_size=4", "data.max_response_length=8",
                 "trainer.total_training_steps=2", "trainer.default_local_dir={o}"],
    "ms-swift-gkd": ["model={s}", "teacher_model={t}", "dataset={d}", "max_steps=2", "per_device_train_batch_size=2",
                     "max_completion_length=8", "output_dir={o}"],
}  # fmt: skip


def method_of(recipe: Recipe) -> Method:
    return build_method(recipe.method.name, recipe.method.arguments)


@pytest.mark.parametrize("name", PEERS)
def test_a_peers_recipe_equals_the_one_written_by_hand(name):
    recipe, method = PEERS[name]
    found = load_recipe(f"peers/{name}")
    assert found == recipe
    assert method_of(found) == method


@pytest.mark.parametrize("name", PEERS)
def test_a_peers_recipe_trains(name, student_path, teacher_path, tmp_path):
    from opdkit.train.loop import train

    data = tmp_path / "sums.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(a + b)} for a in range(6) for b in range(a, 6)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    paths = {"s": student_path, "t": teacher_path, "d": data, "o": tmp_path / "run"}
    small = [setting.format(**paths) for setting in SMALLER[name]]
    own = [
        "task.settings={}",
        "task.eval_size=4",
        "eval.kl_prompts=4",
        "log.top_k=8",
        "log.trackers=[]",
        "task.name=null",
    ]
    recipe = load_recipe(f"peers/{name}", small + own)
    assert type(method_of(recipe).terms[0].loss) is type(PEERS[name][1].terms[0].loss)
    run = train(recipe)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 for row in rows)
    assert parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text())) == recipe


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl_distillation_has_the_loss_of_its_formula(beta):
    """Generalised JSD with beta as the teacher's share, at the temperature, summed and divided by the number of tokens."""
    temperature, n, vocab = 0.8, 7, 30
    data = {"peer": "trl-distillation", "model_name_or_path": "s", "teacher_model_name_or_path": "t",
            "dataset_name": "testbed:sums", "beta": beta, "temperature": temperature}  # fmt: skip
    recipe = parse_recipe(translate(data).data)
    assert recipe.sampling.temperature == recipe.teachers["teacher"].temperature == temperature
    p, q = logits(n, vocab, seed=1), logits(n, vocab, seed=2)
    method = method_of(recipe)
    scaled = p / recipe.sampling.temperature
    step = make_step(method, scaled, q / recipe.teachers["teacher"].temperature, torch.arange(n))
    loss, gradient = logit_gradient(method, scaled, step)

    leaf = p.clone().requires_grad_(True)
    s, t = (leaf / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    m = torch.logaddexp(
        s + torch.tensor(1 - beta, dtype=torch.float64).log(), t + torch.tensor(beta, dtype=torch.float64).log()
    )
    kl = {0.0: (t.exp() * (t - s)), 1.0: (s.exp() * (s - t))}
    value = kl.get(beta, beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum() / n
    (wanted,) = torch.autograd.grad(value, leaf)
    assert abs(loss - value.detach()) < 1e-13
    assert (gradient / temperature - wanted).abs().max() < 1e-14


def test_the_equivalence_script_compiles_without_trl():
    path = Path(__file__).parents[1] / "reproductions" / "trl_equivalence.py"
    spec = importlib.util.spec_from_file_location("trl_equivalence", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


def test_recipe_data_finds_files_beside_a_recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**TRL, "dataset_name": "rows.jsonl"}))
    assert recipe_data(str(tmp_path / "r.yaml"))["task"]["path"] == str(tmp_path / "rows.jsonl")
    assert own_default("nonsense.x") is MISSING
