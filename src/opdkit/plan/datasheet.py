"""What pieces of a job would cost on a named GPU: FLOPs and bytes over its data sheet's rates, times a stated share.

Nothing of this was ever checked against a GPU: it is good for orders of magnitude and for which phase is the longest.
Left out: exchange between GPUs, loading, and the seconds of anything that is neither a product nor the reading of
weights and caches.

Units: seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdkit.lora import EMA
from opdkit.plan.hardware import Gpu
from opdkit.plan.memory import Job, Model, token_bytes
from opdkit.plan.passes import Products, exact_kl_flops, scoring_flops, updating_flops
from opdkit.plan.timing import Along, Decoding

PRODUCTS = 0.35  # share of the data sheet's FLOP/s that forward and backward passes reach
READING = 0.6  # share of the memory's bandwidth that decoding reaches
OPERATIONS, LAUNCH = 25, 6e-6  # of a layer in a decoding step; seconds each takes at least


@dataclass(frozen=True)
class Datasheet:
    """Costs of a job on one of its GPUs."""

    job: Job
    gpu: Gpu

    def load(self) -> float | None:
        return None

    def score(self) -> float:
        return scoring_flops(self.job) / self._rate

    def update(self) -> float:
        t = self.job.recipe.train
        student = self.job.student
        moved = 8 * student.trained_bytes / self.job.shards  # weights, gradients and moments, read and written
        moved += len(self.job.paths(EMA)) * (
            student.trained_bytes + 8 * student.trained
        )  # an average, read and written
        return updating_flops(self.job) / self._rate + t.minibatches * t.epochs * moved / self._bandwidth

    def other(self) -> float:
        return 0.0

    def exact_kl(self, prompts: int) -> float:
        return exact_kl_flops(self.job, self.job.counts.lengths.texts(prompts, 1)) / self._rate

    def decoding(
        self, models: Sequence[Model], group: int, rows: int, *, training: bool, along: Along | None = None
    ) -> Decoding:
        """Every step reads all weights and every row's cache; who reads along does so for several tokens at once."""
        step = row = pair = prompt = 0.0
        for model, every in [*((m, 1) for m in models), *([] if along is None else [(along[0], along[1].every)])]:
            p, layers = Products.of(model), model.architecture.layers
            step += (model.parameters * self._width(model) / self._bandwidth + layers * OPERATIONS * LAUNCH) / every
            row += (p.token + p.logits) / self._rate
            pair += layers * token_bytes(model.architecture, (self._width(model),) * 2) / self._bandwidth / every
            prompt += p.token / self._rate
        return Decoding(0.0, prompt, step, row, pair)

    def _width(self, model: Model) -> int:
        """Bytes of a number in products."""
        dtype = getattr(torch, model.architecture.settings.dtype)
        return 2 if self.job.recipe.train.precision != "fp32" else int(dtype.itemsize)

    @property
    def _rate(self) -> float:
        half = self._width(self.job.student) == 2
        return PRODUCTS * 1e12 * (self.gpu.half if half else self.gpu.single)

    @property
    def _bandwidth(self) -> float:
        return READING * 1e9 * self.gpu.bandwidth
