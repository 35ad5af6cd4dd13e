"""Exported folders: what other tools load from them, what the card says, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opdkit.config import ModelConfig, load_recipe, parse_recipe
from opdkit.errors import RecipeError, RunError
from opdkit.models import load_model
from opdkit.report.read import read_run
from opdkit.train.card import model_card
from opdkit.train.checkpoint import latest_checkpoint
from opdkit.train.export import export
from opdkit.train.loop import train

IDS = torch.tensor([[5, 9, 30, 4]])


def make_run(data: dict, output: Path, **changes) -> Path:
    data = json.loads(json.dumps(data)) | changes
    data["train"] |= {"steps": 2, "checkpoint_every": 1}
    data["sampling"] |= {"temperature": 0.7, "top_p": 0.9, "eos_ids": [1, 5]}
    return train(parse_recipe(data | {"output": str(output)}))


@pytest.fixture(scope="module")
def data(student_path, teacher_path, sums_file) -> dict:
    return {
        "method": {"name": "topk_kl", "k": 4}, "student": {"path": student_path},
        "teachers": {"teacher": {"path": teacher_path}},
        "task": {"kind": "file", "path": sums_file, "eval_size": 8, "verifier": "exact"},
        "sampling": {"max_new_tokens": 8}, "optim": {"lr": 1e-2},
        "train": {"prompts_per_step": 4}, "eval": {"kl_prompts": 4}, "log": {"top_k": 4, "trackers": []},
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return make_run(data, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory) -> Path:
    """A run with adapters on attention and on the tied head."""
    return make_run(
        data, tmp_path_factory.mktemp("runs") / "adapted", lora={"rank": 2, "targets": ["q_proj", "lm_head"]}
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def trained(run: Path) -> torch.Tensor:
    """The student's logits as the run left it."""
    return logits(load_model(ModelConfig(path=str(latest_checkpoint(run))), "student").model)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_run_becomes_a_folder_that_transformers_loads(whole, tmp_path):
    folder = export(whole, to=tmp_path / "model")
    checkpoint = latest_checkpoint(whole)
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in checkpoint.iterdir() if p.name != "trainer"} | {"README.md"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), trained(whole))
    assert AutoTokenizer.from_pretrained(folder).encode("1+2=") == AutoTokenizer.from_pretrained(checkpoint).encode(
        "1+2="
    )
    config = GenerationConfig.from_pretrained(folder)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.7, 0.9, 0)
    assert (config.eos_token_id, config.pad_token_id) == ([1, 5], 0)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_another_step_and_the_usual_place(whole):
    folder = export(whole, step=1)
    assert folder == whole / "export"
    first = whole / "checkpoints" / "step-000001" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == first.read_bytes()
    assert "for 1 step by opdkit" in (folder / "README.md").read_text()
    assert "there was no evaluation after step 1" in (folder / "README.md").read_text()
    shutil.rmtree(folder)


def test_a_precision_changes_every_number_and_the_config(whole, tmp_path):
    folder = export(whole, to=tmp_path / "half", dtype="bfloat16")
    stored, exact = load_file(folder / "model.safetensors"), load_file(latest_checkpoint(whole) / "model.safetensors")
    assert stored.keys() == exact.keys()
    assert all(torch.equal(stored[k], exact[k].to(torch.bfloat16)) for k in exact)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert load_model(ModelConfig(path=str(folder), dtype="bfloat16"), "student").parameters > 0


def test_weights_in_several_files_keep_their_index(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    checkpoint = latest_checkpoint(copy)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    state = json.loads((checkpoint / "trainer" / "state.json").read_text())
    state["files"] = {str(f.relative_to(checkpoint)): f.stat().st_size for f in checkpoint.iterdir() if f.is_file()}
    (checkpoint / "trainer" / "state.json").write_text(json.dumps(state))
    folder = export(copy, to=tmp_path / "half", dtype="bfloat16")
    assert len(list(folder.glob("*.safetensors"))) > 1
    total = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == 2 * sum(p.numel() for p in model.parameters())
    loaded, exact = AutoModelForCausalLM.from_pretrained(folder).state_dict(), model.state_dict()
    assert all(torch.equal(loaded[k], exact[k].to(torch.bfloat16)) for k in exact)


@pytest.mark.filterwarnings("ignore")  # peft on adapters of tied heads
def test_adapters_are_exported_as_they_are(adapted, tmp_path):
    from peft import AutoPeftModelForCausalLM

    folder = export(adapted, to=tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), trained(adapted))
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 5]
    again = load_model(ModelConfig(path=str(folder)), "teacher")
    assert again.eos_ids == (1, 5) and torch.equal(logits(again.model), trained(adapted))
    half = export(adapted, to=tmp_path / "half", dtype="bfloat16")
    assert {v.dtype for v in load_file(half / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_merged_adapters_give_the_same_model_with_an_untied_head(adapted, tmp_path, recwarn):
    folder = export(adapted, to=tmp_path / "merged", merge=True)
    assert not [w for w in recwarn if "tie" in str(w.message)]
    assert not list(folder.glob("adapter_*"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(model) - trained(adapted)).abs().max() < 1e-5
    assert model.config.tie_word_embeddings is False and not hasattr(model.config, "quantization_config")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    base = AutoModelForCausalLM.from_pretrained(load_recipe(str(adapted / "recipe.yaml")).student.path)
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    half = export(adapted, to=tmp_path / "half", merge=True, dtype="bfloat16")
    exact, rounded = load_file(folder / "model.safetensors"), load_file(half / "model.safetensors")
    assert all(torch.equal(rounded[k], exact[k].to(torch.bfloat16)) for k in exact) and exact.keys() == rounded.keys()


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_adapters_of_a_quantised_base_are_merged_into_the_weights_they_were_trained_on(data, tmp_path, how):
    student = data["student"] | {"quantize": how}
    run = make_run(data, tmp_path / "run", lora={"rank": 2}, student=student, eval={"kl_prompts": 0, "teacher": False})
    folder = export(run, to=tmp_path / "merged", merge=True)
    quantised = load_model(ModelConfig(path=str(latest_checkpoint(run)), quantize=how), "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    gap = (logits(model) - logits(quantised.model)).abs().max()
    assert gap < (1e-4 if how == "nf4" else 0.1)  # int8 also rounds the inputs of its products
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The card


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_says_what_the_run_measured(whole, adapted, tmp_path):
    text = (export(whole, to=tmp_path / "model") / "README.md").read_text()
    recipe, run = load_recipe(str(whole / "recipe.yaml")), read_run(whole)
    assert front(text) == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "opdkit", "topk_kl"],
    }  # fmt: skip
    before, after = (next(e for e in run.evals if e.who == "student" and e.step == n) for n in (0, 2))
    teacher = next(e for e in run.evals if e.who == "teacher")
    assert "| | before | after 2 steps | teacher |" in text
    accuracies = [f"{e.accuracy:.1%} ± {e.accuracy_se:.1%}" for e in (before, after, teacher)]
    assert f"| accuracy | {' | '.join(accuracies)} |" in text
    values = [f"{e.reverse_kl:.4f} ± {e.reverse_kl_se:.4f}" for e in (before, after)]
    assert f"| reverse KL, nats per token | {' | '.join(values)} |  |" in text
    for part in (
        "On 8 held-out problems.", "[arXiv:2604.13016](https://arxiv.org/abs/2604.13016)", "`topk_kl` (k = 4): ",
        f"| base model | `{recipe.student.path}` in float32 |",
        f"| teachers | `teacher`: `{recipe.teachers['teacher'].path}` |",
        "| data | prompts of the file `sums.jsonl` |", "temperature 0.7, top-p 0.9, up to 8 new tokens",
        f'AutoModelForCausalLM.from_pretrained("{tmp_path / "model"}"', "| trained | all weights |",
    ):  # fmt: skip
        assert part in text, part
    text = (export(adapted, to=tmp_path / "adapter") / "README.md").read_text()
    assert front(text)["library_name"] == "peft" and "lora" in front(text)["tags"]
    assert "LoRA adapters of rank 2, alpha 32, on q_proj, lm_head |" in text
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path / "adapter"}"' in text


@pytest.mark.filterwarnings("ignore")  # peft on adapters of tied heads
@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_the_code_of_the_card_runs(kind, request, tmp_path, capsys):
    text = (export(request.getfixturevalue(kind), to=tmp_path / "model") / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code.replace('"..."', '"1+2="'), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_hub_names_several_teachers_and_missing_evaluations(whole, tmp_path):
    recipe = load_recipe(str(whole / "recipe.yaml"))
    hub = recipe.model_copy(
        update={
            "student": recipe.student.model_copy(update={"path": "org/base-1B"}),
            "task": recipe.task.model_copy(update={"kind": "dataset", "path": "org/data", "name": "main"}),
        }
    )
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(whole / name, copy / name)
    text = model_card(read_run(copy), hub, 2, "x", adapter=True)
    assert {k: front(text)[k] for k in ("base_model", "base_model_relation", "datasets")} == {
        "base_model": "org/base-1B", "base_model_relation": "adapter", "datasets": ["org/data"],
    }  # fmt: skip
    assert "The run was not evaluated." in text and "`org/data`, configuration `main`, split `train`" in text
    line = {
        "step": 0,
        "who": "student",
        "problems": 4,
        "samples": 2,
        "reverse_kl/a": 0.5,
        "reverse_kl_se/a": 0.25,
        "reverse_kl/b": 1.0,
    }
    (copy / "evals.jsonl").write_text(json.dumps(line) + "\n")
    text = model_card(read_run(copy), hub, 2, "x", adapter=True)
    assert "| reverse KL to a, nats per token | 0.5000 ± 0.2500 |" in text
    assert "| reverse KL to b, nats per token | 1.0000 |" in text
    assert "On 4 held-out problems, 2 samples each; there was no evaluation after step 2." in text


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_what_cannot_be_exported(whole, adapted, tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        export(tmp_path)
    with pytest.raises(RunError, match=r"has no checkpoint of step 7; its checkpoints are of step 1, 2"):
        export(whole, step=7)
    with pytest.raises(RecipeError, match=r"--merge has no effect: .* trained all weights"):
        export(whole, merge=True)
    with pytest.raises(RecipeError, match="dtype = bf16; expected float32, bfloat16, float16"):
        export(adapted, dtype="bf16")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match=r"mine exists and is not overwritten; give another folder with --to"):
        export(whole, to=tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file/x"):
        export(whole, to=tmp_path / "file" / "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]


def test_the_command_prints_the_folder_or_one_line_about_what_is_wrong(adapted, tmp_path):
    from typer.testing import CliRunner

    from opdkit.cli import app

    to = tmp_path / "model"
    arguments = ["export", str(adapted), "--merge", "--dtype", "bfloat16", "--step", "1", "--to", str(to)]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (0, f"{to}\n")
    assert load_file(to / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and done.stderr.startswith(f"error: {to} exists and is not overwritten")


def test_runs_that_are_not_finished_or_damaged(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(info | {"finished": None}))
    with pytest.raises(
        RunError, match=r"is not finished: .* or export a checkpoint as it is with --step 2 \(there are 1, 2\)"
    ):
        export(copy)
    assert export(copy, step=2, to=tmp_path / "two").is_dir()
    os.truncate(copy / "checkpoints" / "step-000002" / "model.safetensors", 100)
    with pytest.raises(RunError, match=r"step-000002 cannot be used: model\.safetensors has 100 bytes"):
        export(copy, step=2, to=tmp_path / "other")
    assert export(copy, step=1, to=tmp_path / "one").is_dir()  # the others are not asked
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="has no complete checkpoint to export"):
        export(copy)


def test_nothing_appears_before_it_is_complete(whole, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opdkit.train.export.model_card", fail)
    with pytest.raises(RunError, match=r"disk full while writing .*model \(No space left on device\)"):
        export(whole, to=tmp_path / "model")
    assert os.listdir(tmp_path) == []
