"""LoRA: adapters inside a model, the same model without them, and adapters that a folder holds (arXiv:2106.09685).

peft replaces linear layers in place, W x becoming W x + scale B A x, so the transformers model stays the model and only
A and B are trained. On the vocabulary head B is the low rank of `Head`, and scale A h are further columns of the hidden
states. Left out: other kinds of adapters, adapters on embeddings, several adapters in one model.

Axes: B sequences, T tokens, D hidden, r rank, P rows of the head's weight.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.config import LoraConfig, Recipe
from opdkit.errors import ModelError, RecipeError

ADAPTER = "default"  # peft's name of the only adapter
ADAPTER_CONFIG = "adapter_config.json"
BASE = "student:base"  # the path of a teacher that is the student as it was before training
LIVE = "student:live"  # ... that is the student as it is now
EMA = "student:ema"  # ... that is an exponential average of the student's weights
SELF, SELF_PREFIX = (BASE, LIVE, EMA), "student:"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model as one of its users sees them: on, or off (the base model)."""

    peft: Any  # peft.PeftModel around the transformers model
    layers: tuple[Any, ...]  # the adapted layers, peft.tuners.lora.LoraLayer
    head: Any | None  # the vocabulary head where it is one of them
    on: bool = True

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Inside the block the adapters are as this user sees them; blocks may be nested."""
        before = self.layers[0].disable_adapters
        self._set(not self.on)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, disabled: bool) -> None:
        # Not peft's `disable_adapter()`: it walks the whole model, and drops and restores requires_grad, at every token.
        if self.layers[0].disable_adapters is not disabled:
            for layer in self.layers:
                layer._disable_adapters = disabled

    @property
    def low_rank(self) -> Float[Tensor, "P r"] | None:
        """B of the vocabulary head, which reads the columns that `extend` appends; None where it has no adapter."""
        return self.head.lora_B[ADAPTER].weight if self.on and self.head is not None else None

    def extend(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows H"]:
        """Hidden states with r more columns, scale x A x dropout(h), where the vocabulary head has an adapter."""
        if not self.on or self.head is None:
            return hidden
        down = self.head.lora_A[ADAPTER]
        columns = down(self.head.lora_dropout[ADAPTER](hidden.to(down.weight.dtype))) * self.head.scaling[ADAPTER]
        return torch.cat([hidden, columns.to(hidden.dtype)], -1)

    @property
    def size(self) -> int:
        """Numbers in A and B of all layers."""
        return sum(p.numel() for n, p in self.peft.named_parameters() if ".lora_" in n)


def attach(model: Any, config: LoraConfig, path: str, *, name: str, seed: int) -> Adapters:
    """Put fresh adapters (B = 0, so nothing changes yet) into a model that was loaded from `path`, and freeze the rest.

    Parameters in half precision get float32 adapters. Raises ModelError when a target matches no linear layer.
    """
    import peft

    layers = find_targets(model, config.targets, name)
    alpha: Any = int(config.alpha) if config.alpha.is_integer() else config.alpha  # as other tools write and expect it
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
        target_modules=_shortest(model, layers), task_type="CAUSAL_LM",
    )  # fmt: skip
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, settings)
    # what PeftModel.from_pretrained users will load: a folder must not depend on where the run was started
    settings.base_model_name_or_path = str(Path(path).resolve()) if Path(path).is_dir() else path
    return _adapters(wrapped)


def stored_base(folder: str, name: str) -> str | None:
    """The path of the model that the adapter in a folder belongs to; None when the folder holds no adapter.

    Raises ModelError for adapters that are not plain LoRA.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        base = stored["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load {name} from '{folder}': {ADAPTER_CONFIG} cannot be read ({error})") from error
    others = [
        k for k in ("modules_to_save", "use_dora", "trainable_token_indices", "target_parameters") if stored.get(k)
    ]
    if stored.get("peft_type") != "LORA" or others or not base:
        given = (
            f"it uses {others[0]}" if others else f"its type is {stored.get('peft_type')} and its base model {base!r}"
        )
        raise ModelError(
            f"cannot load {name} from '{folder}': {given}; expected a plain LoRA adapter that names its base model. "
            "Merge it into its model first and give that folder"
        )
    return str(base)


def load_adapters(model: Any, folder: str, config: LoraConfig | None, name: str) -> Adapters:
    """Put the adapters of a folder into their base model: to be trained on with `config`, frozen without.

    Raises ModelError when they do not fit the model, RecipeError when `config` is not how they were made.
    """
    import peft
    from safetensors import SafetensorError

    try:
        with _quiet():
            wrapped = peft.PeftModel.from_pretrained(model, folder, is_trainable=config is not None)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"cannot load {name} from '{folder}': the adapter does not fit its base model: {what}"
        ) from error
    if config is not None:
        _check_made_with(wrapped, model, config, folder, name)
    return _adapters(wrapped)


def save_adapters(wrapped: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapters of a peft.PeftModel as peft does, and the generation config of the model.

    `weights` is the state of a sharded model, gathered.
    """
    wrapped.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)  # "auto" asks the Hub about them
    (folder / "README.md").unlink()  # peft's empty form of a model card
    wrapped.get_base_model().generation_config.save_pretrained(folder)


def adapter_weights(wrapped: Any) -> dict[str, Tensor]:
    """The adapters of a peft.PeftModel by the names that peft stores, in the model's own memory."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, save_embedding_layers=False)


def find_targets(model: Any, targets: list[str] | str, name: str) -> list[str]:
    """The full names of the linear layers that `lora.targets` stands for. Raises ModelError for one without any."""
    linear = linear_layers(model)
    if targets == "all-linear":
        return [layer for layer in linear if layer != _head_name(model)]
    for target in targets:
        if not _matching(linear, [target]):
            known = sorted({layer.rpartition(".")[2] for layer in linear})
            raise ModelError(
                f"lora.targets: '{target}' matches no linear layer of {name} ({type(model).__name__}); it has "
                f"{', '.join(known)}. Give some of these, full names such as {next(iter(linear))}, or all-linear"
            )
    return _matching(linear, list(targets))


def linear_layers(model: Any) -> list[str]:
    """Names of the layers that can have adapters: linear ones, quantised or not."""
    from transformers.pytorch_utils import Conv1D

    return [
        name.removesuffix(".base_layer")
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D) and ".lora_" not in name
    ]


def check_lora(recipe: Recipe) -> None:
    """Raise RecipeError for settings of `lora`, `quantize` and `student:base` that contradict each other."""
    if recipe.student.path.startswith(SELF_PREFIX):
        raise RecipeError(f"student.path = {recipe.student.path} names the student itself; only a teacher can be that")
    if recipe.student.quantize != "none" and recipe.lora is None:
        raise RecipeError(f"student.quantize = {recipe.student.quantize}: quantised weights cannot be trained; train "
                          "adapters beside them with `lora: {}`, or use quantize: none")  # fmt: skip
    if recipe.lora is not None and recipe.lora.targets == []:
        raise RecipeError("lora.targets is empty, so nothing would be trained; name some layers, or use all-linear")


def _adapters(wrapped: Any) -> Adapters:
    from peft.tuners.lora import LoraLayer

    model = wrapped.get_base_model()
    layers = tuple(m for m in model.modules() if isinstance(m, LoraLayer))
    head = model.get_output_embeddings()
    return Adapters(wrapped, layers, head if isinstance(head, LoraLayer) else None)


def _check_made_with(wrapped: Any, model: Any, config: LoraConfig, folder: str, name: str) -> None:
    stored = wrapped.peft_config[ADAPTER]
    found = {"rank": stored.r, "alpha": float(stored.lora_alpha), "dropout": float(stored.lora_dropout),
             "rslora": bool(stored.use_rslora)}  # fmt: skip
    wanted = {key: getattr(config, key) for key in found}
    found["targets"] = sorted(n.removesuffix(".lora_A") for n, _ in model.named_modules() if n.endswith(".lora_A"))
    wanted["targets"] = sorted(find_targets(model, config.targets, name))
    if wrong := [key for key in found if found[key] != wanted[key]]:
        given = "; ".join(f"{k} {found[k]!r}, lora.{k} {wanted[k]!r}" for k in wrong if k != "targets")
        raise RecipeError(
            f"{name}: the adapter in {folder} was made with {given or 'other targets'}; set `lora` to what the adapter "
            "has, or start from its base model"
        )


def _matching(names: list[str], targets: list[str]) -> list[str]:
    """The names that a target names in full or by their last parts, as peft matches them."""
    return [n for n in names if any(n == target or n.endswith(f".{target}") for target in targets)]


def _shortest(model: Any, layers: list[str]) -> list[str]:
    """Last parts of the names (q_proj, v_proj) where they stand for exactly these layers, else the names."""
    short = sorted({layer.rpartition(".")[2] for layer in layers})
    everything = [name for name, _ in model.named_modules()]
    return short if set(_matching(everything, short)) == set(layers) else layers


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((name for name, m in model.named_modules() if m is head), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings about what is dealt with here: names that transformers gave up, transposed layers
    (GPT-2), and tied heads, whose adapter is the head's alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|tie_word_embeddings)")
        yield
