"""Teachers that are the student: as it was before training, as it is now, or as an exponential average of its weights.

`teachers.NAME.path` is `student:base`, `student:live` or `student:ema`. What they are shown is the view's business.

Left out: averages of adapters while FSDP2 divides the student. A trust region between two of them is a view's model
(`opdkit.view.TrustRegion`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.config import ModelConfig, Recipe, nearest
from opdkit.errors import RecipeError
from opdkit.lora import BASE, EMA, LIVE, SELF, Adapters
from opdkit.models import LanguageModel, load_model
from opdkit.train.sharding import gathered

RATE = 0.05  # SDPO's for reasoning (2601.20802); it takes 0.01 with rich feedback


def self_teacher(student: LanguageModel, own: ModelConfig, config: ModelConfig, name: str) -> LanguageModel:
    """The teacher `name` whose path is one of `student:...`; `own` is the student's section of the recipe.

    base and ema: with adapters the same modules, with the adapters off or averaged ones; without, a second copy, whose
    dtype, attn and quantize are the student's unless `config` says otherwise. live: the same modules. Raises RecipeError
    for an unknown path, and for settings without effect where nothing is loaded.
    """
    if config.path not in SELF:
        raise RecipeError(f"teachers.{name}.path = {config.path}: there is no such teacher{nearest(config.path, SELF)}")
    if config.path == LIVE:
        _refuse_settings(own, config, name)
        return replace(student, name=name, path=LIVE, temperature=config.temperature)
    if config.path == EMA and student.adapters is not None:
        _refuse_settings(own, config, name)
        return replace(student, name=name, path=EMA, temperature=config.temperature, adapters=averaged(student))
    return base_of(student, own, config, name)


def base_of(student: LanguageModel, own: ModelConfig, config: ModelConfig, name: str) -> LanguageModel:
    """The student, made from the recipe's `own`, as it was before training; frozen.

    With adapters it is the same modules with the adapters off. Without, it is a second copy; its dtype, attn and quantize
    are the student's unless `config` says otherwise. Raises RecipeError for such a setting where nothing is loaded.
    """
    if student.adapters is None:
        chosen = {"path": own.path, "dtype": own.dtype, "attn": own.attn, "quantize": own.quantize} | _given(config)
        return replace(load_model(config.model_copy(update=chosen), name, student.device), path=config.path)
    _refuse_settings(own, config, name)
    off = replace(student.adapters, on=False)
    return replace(student, name=name, path=BASE, temperature=config.temperature, adapters=off)


def check_self_teachers(recipe: Recipe) -> None:
    """Raise RecipeError for averages that nothing moves, or that cannot be kept."""
    for name, config in recipe.teachers.items():
        if config.path != EMA and config.ema is not None:
            raise RecipeError(f"teachers.{name}.ema = {config.ema} has no effect with path {config.path}; set path: {EMA}, or "
                              "remove it")  # fmt: skip
        if config.path == EMA and recipe.lora is not None and recipe.train.sharding != "none":
            raise RecipeError(f"teachers.{name}: {EMA} keeps an average of the adapters, which train.sharding = "
                              f"{recipe.train.sharding} divides; use sharding: none, or train the whole student")  # fmt: skip
        if config.path == EMA and recipe.lora is None and config.quantize != "none":
            raise RecipeError(
                f"teachers.{name}.quantize = {config.quantize}: quantised weights cannot be averaged; remove it"
            )


class Averages:
    """The `student:ema` teachers of a run: theta_T <- (1 - a) theta_T + a theta after every update of the student.

    Averaged in float32, or in the weights' own precision where that is higher; a teacher of lower precision gets the rounded
    average, so that small moves add up. Averages are whole in every process.
    """

    def __init__(
        self, student: LanguageModel, teachers: Mapping[str, LanguageModel], configs: Mapping[str, ModelConfig]
    ) -> None:
        self._student = student
        self._rates: dict[str, float] = {}
        self._used: dict[str, list[Tensor]] = {}  # what the teacher computes with
        self._exact: dict[str, list[Tensor]] = {}
        for name, lm in teachers.items():
            if lm.path == EMA:
                self._rates[name] = RATE if configs[name].ema is None else float(configs[name].ema or 0.0)
                a = lm.adapters
                self._used[name] = list(a.average) if isinstance(a, AveragedAdapters) else _weights(lm)
                self._exact[name] = [
                    used if used.dtype.itemsize >= 4 else weight.detach().float().clone()
                    for used, weight in zip(self._used[name], _trained(student), strict=True)
                ]

    @torch.no_grad()
    def update(self) -> None:
        """Move all averages; collective where processes share the student."""
        if not self._rates:
            return
        for i, weight in enumerate(_trained(self._student)):
            now = gathered(weight.detach())
            for name, rate in self._rates.items():
                self._exact[name][i].lerp_(now.to(self._exact[name][i]), rate)
        self._publish()

    def state(self) -> dict[str, Any]:
        """For the checkpoint; empty where nothing is averaged."""
        return {"averages": dict(self._exact)} if self._rates else {}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        for name, exact in self._exact.items():
            for mine, stored in zip(exact, saved["averages"][name], strict=True):
                mine.copy_(stored)
        self._publish()

    def _publish(self) -> None:
        for name, exact in self._exact.items():
            for used, value in zip(self._used[name], exact, strict=True):
                if used is not value:
                    used.copy_(value)


@dataclass(frozen=True)
class AveragedAdapters(Adapters):
    """The adapters of a model with other numbers in A and B, put in place of the student's while this user computes."""

    trained: tuple[Tensor, ...] = ()  # the student's parameters
    average: tuple[Tensor, ...] = ()  # the numbers that replace them, in the same order

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Inside the block the adapters hold the averages; blocks may be nested. Not for training."""
        with super().switched():
            held = [p.data for p in self.trained]
            self._put(self.average)
            try:
                yield
            finally:
                self._put(held)

    def _put(self, numbers: Any) -> None:
        torch.clear_autocast_cache()  # it holds the parameters of before in another precision
        for parameter, value in zip(self.trained, numbers, strict=True):
            parameter.data = value

    @property
    def low_rank(self) -> Float[Tensor, "P r"] | None:
        with self.switched():
            found = super().low_rank
            return None if found is None else found.data

    def extend(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows H"]:
        with self.switched():
            return super().extend(hidden)


def averaged(student: LanguageModel) -> AveragedAdapters:
    """The adapters of a student as they are now, in memory of their own."""
    a = student.adapters
    assert a is not None
    trained = tuple(_trained(student))
    average = tuple(p.detach().clone() for p in trained)
    return AveragedAdapters(a.peft, a.layers, a.head, a.on, trained, average)


def _trained(student: LanguageModel) -> list[Tensor]:
    return [p for p in student.model.parameters() if p.requires_grad]


def _weights(lm: LanguageModel) -> list[Tensor]:
    """The tensors of a whole copy, in the order of the student's parameters."""
    return [p.data for p in lm.model.parameters()]


def _given(config: ModelConfig) -> dict[str, str]:
    default = ModelConfig(path=BASE)
    given = {key: getattr(config, key) for key in ("dtype", "attn", "quantize")}
    return {key: value for key, value in given.items() if value != getattr(default, key)}


def _refuse_settings(own: ModelConfig, config: ModelConfig, name: str) -> None:
    what = {BASE: "with its adapters off", LIVE: "as they are", EMA: "with an average of its adapters"}[config.path]
    for key, value in _given(config).items():
        if value != getattr(own, key):
            raise RecipeError(f"teachers.{name}.{key} = {value} has no effect: {config.path} is the student's own weights "
                              f"{what}, and they are {getattr(own, key)}; remove it")  # fmt: skip
