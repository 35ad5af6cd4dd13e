"""The optimiser of a run: AdamW, its schedule, gradient clipping and loss scaling, with a state that is saved whole.

The state has one format whatever the number of processes and whether they share the student, so that a run may go on
with another number of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opdkit import scratch
from opdkit.config import Recipe
from opdkit.errors import NonFiniteError
from opdkit.models import LanguageModel
from opdkit.train.processes import Processes
from opdkit.train.sharding import gathered, is_sharded, last_micro_batch, scattered


class Optimiser:
    """AdamW with weight decay on matrices only, the recipe's schedule (one value per update) and norm clipping."""

    def __init__(self, recipe: Recipe, lm: LanguageModel, processes: Processes) -> None:
        self.lm, self.processes, self.clip = lm, processes, recipe.optim.grad_clip
        self.parameters = [p for p in lm.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(recipe, self.parameters)
        self.scheduler = make_scheduler(recipe, self.optimizer)
        self.scaler = torch.amp.GradScaler(lm.device.type, enabled=recipe.train.precision == "fp16")
        self._ordered = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, losses: Iterator[Tensor], expected: int) -> dict[str, float]:
        """One update from `expected` micro-batch losses that add up, over all processes, to its loss.

        Raises NonFiniteError, with the weights untouched, when loss or gradient is not finite; under fp16 an infinite
        gradient only lowers the loss scale and skips this update.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        scale = float(self.processes.count) if is_sharded(self.lm) else 1.0  # FSDP2 averages, we add
        for number, loss in enumerate(losses, 1):
            last_micro_batch(self.lm, number == expected)
            if number == expected:
                scratch.release()  # no more logits until the next step scores: the backward pass needs the memory
            self.scaler.scale(loss * scale).backward()
            total += float(loss.detach())
        if not is_sharded(self.lm):
            self.processes.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)))
        (total,) = self.processes.total([total])
        finite = abs(norm) < float("inf")
        if not abs(total) < float("inf") or not (finite or self.scaler.is_enabled()):
            raise NonFiniteError(
                f"loss is {total} and gradient norm {norm}; this update was not made and the weights are unchanged. Look at "
                "the saved batch, lower optim.lr or use train.precision: fp32"
            )
        rate = float(self.scheduler.get_last_lr()[0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        found = {"loss": total, "grad_norm": norm, "lr": rate}
        return found | ({"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})

    def state(self) -> dict[str, Any]:
        """For the checkpoint; collective where processes share the student."""
        return {
            "optimizer": gathered(self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        stored = saved["optimizer"]
        self.optimizer.load_state_dict({**stored, "state": scattered(stored["state"], self._ordered)})
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])


def make_optimizer(recipe: Recipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    o = recipe.optim
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def updates_per_step(recipe: Recipe) -> int:
    return recipe.train.minibatches * recipe.train.epochs


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The recipe's schedule, one value per update; its warm-up is given in steps."""
    from transformers import get_scheduler

    per_step = updates_per_step(recipe)
    name = "constant_with_warmup" if recipe.optim.schedule == "constant" else recipe.optim.schedule
    return get_scheduler(
        name, optimizer, num_warmup_steps=recipe.optim.warmup_steps * per_step,
        num_training_steps=recipe.train.steps * per_step,
    )  # fmt: skip
