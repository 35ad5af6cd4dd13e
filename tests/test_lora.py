"""LoRA and QLoRA: the base under the adapters, adapters on the head, targets, stored adapters, and whole runs."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from test_models import BASE, GPT2, random_model

from opdkit.config import LoraConfig, ModelConfig, parse_recipe
from opdkit.errors import ModelError, RecipeError, RunError
from opdkit.head import RowTerm, objective
from opdkit.lora import attach, linear_layers
from opdkit.losses import CrossEntropy
from opdkit.models import LanguageModel, checkpoint_activations, load_model, load_models
from opdkit.rollouts.sampler import Sampling, sample
from opdkit.self_teacher import base_of
from opdkit.step import Layout, Step
from opdkit.train.checkpoint import latest_checkpoint, load_weights
from opdkit.train.evaluate import evaluate_run
from opdkit.train.loop import train

IDS = torch.tensor([[5, 9, 30, 4], [7, 12, 3, 0]])
WITH_HEAD = LoraConfig(rank=3, targets=["q_proj", "down_proj", "lm_head"])


def moved(lm: LanguageModel, seed: int = 3) -> LanguageModel:
    """The model with adapters that do something: B is 0 when it is made."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in lm.model.named_parameters():
        if ".lora_B." in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return lm


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.head().logits(lm.hidden(IDS).flatten(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The base under the adapters


@pytest.mark.parametrize("config", [LoraConfig(rank=4), WITH_HEAD, LoraConfig(rank=2, targets=["lm_head"])])
def test_with_the_adapters_off_the_student_is_its_base_bit_for_bit(student_path, config):
    plain = load_model(ModelConfig(path=student_path), "student")
    student = load_model(ModelConfig(path=student_path), "student", lora=config)
    assert torch.equal(logits(student), logits(plain))  # B = 0
    moved(student)
    before = {id(m): m for m in student.model.modules()}
    base = base_of(student, ModelConfig(path=student_path), ModelConfig(path="student:base", temperature=2.0), "base")
    assert {id(m) for m in base.model.modules()} == before.keys()  # no second copy
    assert (base.temperature, base.parameters) == (2.0, plain.parameters)
    base.temperature = 1.0
    how = Sampling(group=2, max_new_tokens=6)
    first = logits(student)
    assert not torch.allclose(first, logits(plain), atol=1e-2)
    for _ in range(2):  # on, off and on again
        assert torch.equal(logits(base), logits(plain))
        assert torch.equal(logits(student), first)
        ours, theirs, own = (sample(lm, [[5, 9]], how, 0)[0] for lm in (base, plain, student))
        assert [s.ids for s in ours] == [s.ids for s in theirs]
        assert all(torch.equal(a.capture.logp, b.capture.logp) for a, b in zip(ours, theirs, strict=True))
        assert not torch.equal(own[0].capture.entropy[:1], ours[0].capture.entropy[:1])
    trained = {n for n, p in student.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in student.model.named_parameters() if ".lora_" in n}
    assert student.parameters - plain.parameters == sum(
        dict(student.model.named_parameters())[n].numel() for n in trained
    )


def test_without_adapters_the_base_is_a_frozen_second_copy(student_path):
    recipe = {"method": {"name": "opd"}, "student": {"path": student_path, "dtype": "bfloat16"},
              "teachers": {"t": {"path": "student:base"}}, "task": {"kind": "testbed", "name": "sums"}}  # fmt: skip
    student, teachers = load_models(parse_recipe(recipe), torch.device("cpu"), 0)
    base = teachers["t"]
    assert torch.equal(logits(student), logits(base)) and base.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in base.model.parameters())
    assert all(p.requires_grad for p in student.model.parameters())
    student.model.model.norm.weight.data += 1.0
    assert not torch.equal(logits(student), logits(base))
    recipe["teachers"]["t"]["dtype"] = "float16"
    assert load_models(parse_recipe(recipe), torch.device("cpu"), 0)[1]["t"].model.dtype == torch.float16
    with pytest.raises(
        RecipeError, match=r"teachers\.t\.dtype = float16 has no effect: student:base is the student's own"
    ):
        load_models(parse_recipe(recipe | {"lora": {}}), torch.device("cpu"), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on the head


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapted_head_is_low_rank_and_further_columns(student_path, rslora):
    config = LoraConfig(rank=4, alpha=6, targets=["lm_head"], rslora=rslora)
    lm = moved(load_model(ModelConfig(path=student_path), "student", lora=config))
    layer = lm.model.lm_head
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    head, hidden = lm.head(), lm.hidden(IDS)
    assert hidden.shape == (2, 4, 36) and head.low_rank is up
    h = hidden[..., :32].detach()
    assert torch.allclose(hidden[..., 32:], h @ down.T * (6 / (2 if rslora else 4)), atol=1e-6)
    with torch.no_grad():
        own = lm.model(input_ids=IDS).logits[..., :44]
        assert (own - head.logits(hidden.flatten(0, 1)).view(2, 4, 44)).abs().max() < 1e-5
    for s in sample(lm, [[5, 9, 30]], Sampling(2, 5), 0)[0]:
        with torch.no_grad():
            lp = lm.model(torch.tensor([[5, 9, 30, *s.ids]])).logits[0, 2:-1, :44].log_softmax(-1)
        assert (s.capture.logp - lp.gather(1, torch.tensor(s.ids)[:, None]).squeeze(1)).abs().max() < 1e-5
    (greedy,) = sample(lm, [[5, 9, 30]], Sampling(1, 6, 0.0), 0)
    out = lm.model.generate(
        torch.tensor([[5, 9, 30]]), do_sample=False, max_new_tokens=6, suppress_tokens=range(44, 48)
    )
    assert list(greedy[0].ids) == out[0, 3:].tolist()


def test_gradients_of_adapters_on_and_under_the_head_are_autograd_s(student_path):
    lm = moved(load_model(ModelConfig(path=student_path), "student", lora=WITH_HEAD))
    tokens = torch.tensor([9, 30, 4, 12, 3, 2])
    rows, positions = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    layout = Layout(rows, rows, torch.tensor([0, 1]))
    step = Step(layout=layout, tokens=tokens, views={}, horizon=4)
    coef = torch.linspace(0.1, 0.6, 6)
    loss, _ = objective(lm.hidden(IDS)[rows, positions], lm.head(), [RowTerm(CrossEntropy(), step, None, coef)], 4)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.requires_grad}
    lm.model.zero_grad()
    lp = lm.model(input_ids=IDS).logits[..., :44].log_softmax(-1)[rows, positions, tokens]
    (-(coef * lp).sum()).backward()
    for name, p in lm.model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(ours[name], p.grad, atol=1e-6), name
            assert p.grad.abs().max() > 1e-5


def test_dropout_on_the_head_acts_on_its_input_while_training_only(student_path):
    config = LoraConfig(rank=4, targets=["lm_head"], dropout=0.5)
    lm = moved(load_model(ModelConfig(path=student_path), "student", lora=config))
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lm.extend(h), lm.extend(h))
    assert torch.allclose(lm.head().logits(lm.extend(h)), lm.model.lm_head(h)[:, :44], atol=1e-5)
    lm.model.train()
    torch.manual_seed(1)
    ours = lm.head().logits(lm.extend(h))
    torch.manual_seed(1)
    theirs = lm.model.lm_head(h)[:, :44]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, lm.head().logits(lm.extend(h)), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# How they are made


def test_targets_and_what_they_match(student_path):
    load = lambda **lora: load_model(ModelConfig(path=student_path), "student", lora=LoraConfig(rank=2, **lora))  # noqa: E731
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    lm = load()
    assert sorted(lm.adapters.peft.peft_config["default"].target_modules) == sorted(
        [*attention, "down_proj", "gate_proj", "up_proj"]
    )
    assert len(lm.adapters.layers) == 14 and lm.adapters.head is None
    assert len(linear_layers(lm.model)) == 15  # the same names as before: the adapters' own layers do not count
    one = load(targets=["model.layers.1.mlp.up_proj"])
    assert one.adapters.peft.peft_config["default"].target_modules == {"model.layers.1.mlp.up_proj"}
    assert len(load(targets=["layers.0.mlp.up_proj", "q_proj"]).adapters.layers) == 3
    for wrong in ("query", "embed_tokens", "proj", "mlp"):
        message = (
            rf"lora.targets: '{wrong}' matches no linear layer of student \(Qwen3ForCausalLM\); it has "
            r"down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj\. Give some of these, full names such as "
            r"model.layers.0.self_attn.q_proj, or all-linear"
        )
        with pytest.raises(ModelError, match=message):
            load(targets=["q_proj", wrong])


def test_layers_that_are_transposed_linear_ones():
    lm = random_model("gpt2", **GPT2)
    first = logits(lm)
    lm.adapters = attach(lm.model, LoraConfig(rank=2), "gpt2", name="student", seed=0)
    lm.model.eval()
    assert {type(m).__name__ for m in lm.adapters.layers} == {"Linear"} and len(lm.adapters.layers) == 8
    assert torch.equal(logits(lm), first)
    moved(lm).check_head()
    assert not torch.allclose(logits(lm), first, atol=1e-3)


def test_fresh_adapters_depend_on_the_seed_and_on_nothing_else(student_path):
    def first(seed: int) -> torch.Tensor:
        lm = load_model(ModelConfig(path=student_path), "student", lora=LoraConfig(rank=2), seed=seed)
        return lm.adapters.layers[0].lora_A["default"].weight

    torch.manual_seed(5)
    state = torch.get_rng_state()
    a = first(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(a, first(1)) and not torch.equal(a, first(2))


def test_half_precision_parameters_get_float32_adapters(student_path):
    lm = moved(load_model(ModelConfig(path=student_path, dtype="bfloat16"), "student", lora=WITH_HEAD))
    assert {p.dtype for p in lm.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lm.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    lm.check_head()
    assert lm.hidden(IDS).dtype == torch.bfloat16 and lm.head().low_rank.dtype == torch.float32


def test_recomputed_activations_give_the_same_gradients(student_path):
    def gradients(recompute: bool) -> list[torch.Tensor]:
        lm = moved(load_model(ModelConfig(path=student_path), "student", lora=LoraConfig(rank=2)))
        if recompute:
            checkpoint_activations(lm.model)
        lm.model.train()
        lm.hidden(IDS).square().sum().backward()
        return [p.grad for p in lm.model.parameters() if p.requires_grad]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == 28 and all(g.abs().max() > 0 for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Quantised weights


@pytest.mark.parametrize(("how", "worst"), [("nf4", 0.3), ("int8", 0.03)])
def test_a_quantised_student_trains_its_adapters_and_keeps_its_head(student_path, how, worst):
    config = ModelConfig(path=student_path, quantize=how)
    plain = load_model(ModelConfig(path=student_path), "student")
    lm = load_model(config, "student", lora=LoraConfig(rank=2))
    gap = (logits(lm) - logits(plain)).abs().max() / logits(plain).abs().max()
    assert 1e-4 < gap < worst
    assert lm.model.lm_head.weight.dtype == torch.float32 and lm.parameters == plain.parameters + lm.adapters.size
    lm.hidden(IDS).square().sum().backward()
    assert all((p.grad is not None) is (".lora_" in n) for n, p in lm.model.named_parameters())
    base = base_of(moved(lm), config, ModelConfig(path="student:base"), "base")
    teacher = load_model(config, "teacher")
    assert torch.equal(logits(base), logits(teacher)) and not torch.equal(logits(base), logits(lm))


def test_quantised_weights_that_cannot_be_trained_or_loaded(recipe_data, student_path, monkeypatch):
    recipe = parse_recipe(recipe_data | {"student": {"path": student_path, "quantize": "nf4"}})
    with pytest.raises(
        RecipeError, match=r"student.quantize = nf4: quantised weights cannot be trained; .* `lora: {}`"
    ):
        load_models(recipe, torch.device("cpu"), 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModelError, match=r"t: quantize = int8 needs a package: pip install 'opdkit\[qlora\]'"):
        load_model(ModelConfig(path=student_path, quantize="int8"), "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"path": "student:base"}}, "student.path = student:base names the student itself; only a teacher"),
        ({"lora": {"targets": []}}, "lora.targets is empty, so nothing would be trained"),
    ],
)
def test_settings_that_contradict_each_other(recipe_data, change, message):
    with pytest.raises(RecipeError, match=message):
        train(parse_recipe(recipe_data | change))


# ---------------------------------------------------------------------------------------------------------------------
# Runs and stored adapters


def lora_run(data: dict, output: Path, *, resume: bool = False, steps: int = 4, **changes) -> Path:
    lora = {"rank": 2, "targets": ["q_proj", "lm_head"], "dropout": 0.1}
    train_part = data["train"] | {"steps": steps, "checkpoint_every": 2, "keep_checkpoints": 9}
    return train(
        parse_recipe(data | {"lora": lora, "train": train_part, "output": str(output)} | changes), resume=resume
    )


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(student_path, teacher_path, sums_file, tmp_path_factory) -> Path:
    """A run of four steps with adapters."""
    data = {
        "method": {"name": "full_opd"}, "student": {"path": student_path},
        "teachers": {"teacher": {"path": teacher_path}},
        "task": {"kind": "file", "path": sums_file, "eval_size": 8, "verifier": "exact"},
        "sampling": {"group": 2, "max_new_tokens": 8}, "optim": {"lr": 1e-2},
        "train": {"prompts_per_step": 4, "microbatch_tokens": 64}, "eval": {"kl_prompts": 4},
        "log": {"top_k": 4, "trackers": []},
    }  # fmt: skip
    return lora_run(data, tmp_path_factory.mktemp("lora") / "run")


def recipe_of(run: Path) -> dict:
    import yaml

    return yaml.safe_load((run / "recipe.yaml").read_text())


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path):
    data = recipe_of(finished)
    other = tmp_path / "run"
    train(parse_recipe(data | {"output": str(other), "train": data["train"] | {"steps": 2}}))
    train(parse_recipe(data | {"output": str(other)}), resume=True)
    two, four = (finished / "checkpoints" / f"step-{n:06d}" for n in (2, 4))
    ours, theirs = adapters(other / "checkpoints" / "step-000004"), adapters(four)
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not all(torch.equal(adapters(two)[k], theirs[k]) for k in theirs)
    loss = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (finished, other)
    ]
    assert loss[0] == loss[1] and len(loss[0]) == 4


@pytest.mark.filterwarnings("ignore")  # peft on adapters of tied heads
def test_a_checkpoint_has_peft_s_layout_and_other_tools_load_it(finished, student_path):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = latest_checkpoint(finished)
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not names & {"README.md", "model.safetensors", "config.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (student_path, 2)
    assert sorted(config["target_modules"]) == ["lm_head", "q_proj"]
    lm = load_model(ModelConfig(path=str(folder)), "student")
    with torch.no_grad():
        ours = lm.model(IDS).logits
        base = AutoModelForCausalLM.from_pretrained(student_path)
        assert not torch.allclose(base(IDS).logits, ours, atol=1e-3)
        wrapped = PeftModel.from_pretrained(base, folder)
        assert torch.equal(wrapped(IDS).logits, ours)
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(folder)(IDS).logits, ours)
    assert AutoTokenizer.from_pretrained(folder).encode("1+2=") == lm.tokenizer.encode("1+2=")


def test_weights_come_back_exactly_and_only_into_the_same_kind_of_student(finished, student_path, tmp_path):
    folder = latest_checkpoint(finished)
    config = LoraConfig(rank=2, targets=["q_proj", "lm_head"])
    lm = load_model(ModelConfig(path=student_path), "student", lora=config)
    load_weights(lm.saved, folder)
    stored = adapters(folder)
    own = {n.replace(".default", ""): p for n, p in lm.adapters.peft.named_parameters() if ".lora_" in n}
    assert own.keys() == stored.keys() and all(torch.equal(own[n], stored[n]) for n in own)
    with pytest.raises(RunError, match="it holds an adapter, the student has none; use the `lora` of this run"):
        load_weights(load_model(ModelConfig(path=student_path), "student").saved, folder)
    for other in (LoraConfig(rank=3, targets=["q_proj", "lm_head"]), LoraConfig(rank=2, targets=["q_proj"])):
        with pytest.raises(RunError, match="does not fit the student"):
            load_weights(load_model(ModelConfig(path=student_path), "student", lora=other).saved, folder)
    more = load_model(
        ModelConfig(path=student_path), "student", lora=LoraConfig(rank=2, targets=["lm_head", "q_proj", "k_proj"])
    )
    with pytest.raises(RunError, match=r"it has no weights for .*k_proj"):
        load_weights(more.saved, folder)


def test_a_run_is_evaluated_with_its_adapters(finished):
    last = [json.loads(line) for line in (finished / "evals.jsonl").read_text().splitlines()][-1]
    text = evaluate_run(str(finished), [])
    assert f"reverse kl {last['reverse_kl']:.4f} nats/token" in text


def test_the_student_s_base_as_its_own_teacher(recipe_data, tmp_path):
    recipe_data["teachers"]["teacher"] = {"path": "student:base"}
    run = lora_run(recipe_data, tmp_path / "run", steps=1)
    before, after = (
        r for r in map(json.loads, (run / "evals.jsonl").read_text().splitlines()) if r["who"] == "student"
    )
    assert before["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert 0 <= after["reverse_kl"] < 0.1  # a step of Adam moves even where the gradient is rounding noise


def test_stored_adapters_as_student_and_teacher(finished, student_path, recipe_data):
    folder = str(latest_checkpoint(finished))
    teacher = load_model(ModelConfig(path=folder), "teacher")
    assert not any(p.requires_grad for p in teacher.model.parameters())
    student = load_model(
        ModelConfig(path=folder), "student", lora=LoraConfig(rank=2, targets=["q_proj", "lm_head"], dropout=0.1)
    )
    assert {n for n, p in student.model.named_parameters() if p.requires_grad} == {
        n for n, _ in student.model.named_parameters() if ".lora_" in n
    }
    assert torch.equal(logits(student), logits(teacher))
    base = base_of(student, ModelConfig(path=folder), ModelConfig(path="student:base"), "base")
    assert torch.equal(logits(base), logits(load_model(ModelConfig(path=student_path), "student")))
    with pytest.raises(
        RecipeError, match=r"was made with rank 2, lora.rank 8; dropout 0.1, lora.dropout 0.0; set `lora`"
    ):
        load_model(ModelConfig(path=folder), "student", lora=LoraConfig(rank=8, targets=["q_proj", "lm_head"]))
    with pytest.raises(RecipeError, match="was made with other targets"):
        load_model(ModelConfig(path=folder), "student", lora=LoraConfig(rank=2, targets=["q_proj"], dropout=0.1))
    with pytest.raises(RecipeError, match="holds an adapter, which cannot be trained as a whole model: add `lora`"):
        load_models(parse_recipe(recipe_data | {"student": {"path": folder}}), torch.device("cpu"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "/no/such/model"}, "an adapter of '/no/such/model': no such folder"),
        ({"base_model_name_or_path": None}, "its type is LORA and its base model None; expected a plain LoRA adapter"),
        ({"peft_type": "IA3"}, "its type is IA3"),
        ({"use_dora": True}, "it uses use_dora; expected a plain LoRA adapter .* Merge it into its model first"),
        ({"r": 5}, "the adapter does not fit its base model"),
        (None, "adapter_config.json cannot be read"),
    ],
)
def test_stored_adapters_that_cannot_be_used(finished, tmp_path, change, message):
    folder = tmp_path / "adapter"
    shutil.copytree(latest_checkpoint(finished), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text("{" if change is None else json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(path=str(folder)), "teacher")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_transformers_follows_by_itself_is_refused(finished, monkeypatch):
    monkeypatch.setattr("opdkit.models.stored_base", lambda path, name: None)  # as for an id on the Hub
    with pytest.raises(ModelError, match=r"teacher \(.*\) is an adapter on the Hub; download it and give its folder"):
        load_model(ModelConfig(path=str(latest_checkpoint(finished))), "teacher")


def test_an_adapter_of_a_model_with_another_shape(finished, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(latest_checkpoint(finished), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = make_model(tmp_path / "other", 1, rows=52, tokenizer=make_tokenizer())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the adapter does not fit its base model"):
        load_model(ModelConfig(path=str(folder)), "teacher")


def test_architectures_with_a_scaled_or_capped_head_keep_it_under_an_adapter():
    for settings in ({"kind": "cohere", "logit_scale": 0.25}, {"kind": "granite", "logits_scaling": 8.0}):
        lm = random_model(**(BASE | settings))
        lm.adapters = attach(lm.model, LoraConfig(rank=2, targets=["lm_head"]), "x", name="student", seed=0)
        lm.model.eval()
        moved(lm).check_head()
        with torch.no_grad():
            own = lm.model(IDS).logits[..., :44]
        assert (own.flatten(0, 1) - logits(lm)).abs().max() < 1e-5


def test_a_damaged_adapter_is_refused_and_the_checkpoint_to_use_is_named(finished, student_path, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = LoraConfig(rank=2, targets=["q_proj", "lm_head"])
    lm = load_model(ModelConfig(path=student_path), "student", lora=config)
    file = run / "checkpoints" / "step-000004" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RunError, match=r"adapter_model\.safetensors has .* --resume goes on from step-000002"):
        load_weights(lm.saved, file.parent)


def test_evaluating_a_whole_student_keeps_its_base_teacher_untrained(recipe_data, tmp_path):
    recipe_data["teachers"]["base"] = {"path": "student:base", "temperature": 2.0}
    recipe_data["method"] = {"name": "opd", "teacher": "base"}
    del recipe_data["teachers"]["teacher"]
    recipe_data |= {"output": str(tmp_path / "run"), "optim": {"lr": 1e-2}}
    run = train(parse_recipe(recipe_data))
    last = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()][-1]
    assert f"reverse kl {last['reverse_kl']:.4f} nats/token" in evaluate_run(str(run), [])
