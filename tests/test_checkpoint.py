"""Checkpoints: exact round trips, exact continuation, other tools, and which folders stay."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import RECIPE, SHAPE, identical, same, save, tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from opdkit.errors import RunError
from opdkit.train.checkpoint import (
    checkpoint_step,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from opdkit.train.data import PromptOrder
from opdkit.train.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(str(tmp_path / "run"), RECIPE, resume=False) as opened:
        yield opened


class Training:
    """Random batches, AdamW with two groups, a schedule and a prompt order: all that a resume has to restore.

    It leaves python's generator alone: the type checks of the tests draw from it.
    """

    def __init__(self, tied: bool) -> None:
        self.model = tiny(0, tied)
        decay, rest = [[p for p in self.model.parameters() if (p.dim() == 2) is matrix] for matrix in (True, False)]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=6)
        self.order = PromptOrder(5, seed=2)

    def step(self) -> None:
        first = torch.tensor(self.order.take(4)).unsqueeze(1)
        ids = torch.cat([first, torch.randint(0, 64, (4, 6))], 1)
        self.model(input_ids=ids, labels=ids).loss.mul(1 + np.random.rand()).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, object]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.order.state(),
            "rng": rng_state(),
        }

    def restore(self, path: Path) -> None:
        load_weights(self.model, path)
        state = load_checkpoint(path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.order = PromptOrder.restore(5, 2, state["order"])
        set_rng_state(state["rng"])


@pytest.mark.parametrize("tied", [False, True])
def test_three_steps_and_three_resumed_ones_are_six_uninterrupted_ones(run, tied):
    whole = Training(tied)
    for step in range(6):
        if step == 3:
            path = save_checkpoint(run, 3, whole.model, tiny_tokenizer(), whole.state(), keep=1)
        whole.step()
    resumed = Training(tied)
    resumed.step()  # it must not matter what the objects held before
    resumed.restore(path)
    assert identical(resumed.optimizer.state_dict(), load_checkpoint(path)["optimizer"])
    for _ in range(3):
        resumed.step()
    assert same(whole.model, resumed.model)
    assert identical(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert whole.scheduler.get_last_lr() == resumed.scheduler.get_last_lr()
    assert whole.order.take(7) == resumed.order.take(7)
    tensors = [(whole.model.lm_head.weight is whole.model.model.embed_tokens.weight) for whole in (whole, resumed)]
    assert tensors == [tied, tied]


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_folder_in_the_training_dtype(run, tied, capsys):
    model = tiny(1, tied).to(torch.bfloat16)
    model.generation_config.eos_token_id = 63
    path = save(run, 100, model)
    assert path == run.path / "checkpoints" / "step-000100"
    assert capsys.readouterr() == ("", "")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert same(loaded, model)
    assert (loaded.dtype, loaded.generation_config.eos_token_id) == (torch.bfloat16, 63)
    assert AutoTokenizer.from_pretrained(path)("w5 w7")["input_ids"] == [5, 7]
    assert checkpoint_step(path) == run.info["step"] == 100


def test_models_that_are_stored_under_other_names_come_back_exactly(run):
    def experts(seed: int) -> Qwen3MoeForCausalLM:
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(**SHAPE, num_hidden_layers=1, num_experts=4, moe_intermediate_size=16)
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
        model.model.layers[0].mlp.gate.float()  # a router in higher precision
        return model

    model, other = experts(0), experts(1)
    path = save(run, 1, model)
    assert not same(model, other)
    load_weights(other, path)
    assert same(model, other)
    with pytest.raises(RunError, match=r"set student\.dtype"):
        load_weights(experts(1).float(), path)


def test_weights_of_another_model_are_refused(run):
    path = save(run, 1, tiny(0))
    with pytest.raises(RunError, match=r"is torch\.float32, the student's is torch\.bfloat16; set student\.dtype"):
        load_weights(tiny(0).to(torch.bfloat16), path)
    with pytest.raises(RunError, match="does not fit the student"):
        load_weights(Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"vocab_size": 65}, num_hidden_layers=2)), path)
    with pytest.raises(RunError, match=r"no weights for model\.layers\.2"):
        load_weights(Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=3)), path)
    with pytest.raises(RunError, match=r"layers\.1\.\S+ \[.*\] does not fit the student"):
        load_weights(Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=1)), path)
    moe = Qwen3MoeConfig(**SHAPE, num_hidden_layers=1, num_experts=2, moe_intermediate_size=16)
    with pytest.raises(RunError, match="holds a Qwen3ForCausalLM, the student is a Qwen3MoeForCausalLM"):
        load_weights(Qwen3MoeForCausalLM(moe), path)


def test_the_newest_stay_and_stale_folders_go(run):
    model = tiny(0)
    assert latest_checkpoint(run.path) is None
    save(run, 1, model)
    for name in ("step-000900.tmp-1", "step-000901", "notes"):  # a killed save, an incomplete copy, something else
        (run.path / "checkpoints" / name).mkdir()
    assert latest_checkpoint(run.path).name == "step-000001"
    for step in (2, 3, 1_000_000):
        assert save(run, step, model) == latest_checkpoint(run.path)
    kept = ["notes", "step-000003", "step-000901", "step-1000000"]
    assert sorted(os.listdir(run.path / "checkpoints")) == kept


def test_a_save_below_a_leftover_step_does_not_delete_itself(run):
    model = tiny(0)
    save(run, 50, model)
    path = save(run, 20, model, keep=1)
    assert os.listdir(run.path / "checkpoints") == [path.name] == ["step-000020"]


def test_a_second_save_of_a_step_replaces_the_first_and_never_leaves_none(run, monkeypatch):
    first, second = tiny(0), tiny(1)
    save(run, 5, first, keep=1)
    rename, seen = os.rename, []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        seen.append(latest_checkpoint(run.path).name)

    monkeypatch.setattr(os, "rename", watched)
    path = save(run, 5, second, keep=1)
    assert seen == ["step-000005.old", "step-000005", "step-000005"]
    assert os.listdir(run.path / "checkpoints") == ["step-000005"]
    load_weights(first, path)
    assert same(first, second)
