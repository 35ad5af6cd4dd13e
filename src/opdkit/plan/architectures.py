"""What a model of a recipe is, without its weights: configuration, tokenizer where one is here, and a model on the
meta device.

A folder, a cached Hub model and the engine's own builds are read where they are; for the models of the shipped recipes
the facts of their config.json lie in `models.json`. Left out: any network, and weights.
"""

import copy
import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from opdkit.config import ModelConfig, nearest
from opdkit.errors import ModelError
from opdkit.lora import stored_base
from opdkit.models import cache_folder

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: 4 bits, a byte for each 64, a float32 for each 64 x 256
INT8 = 1.0


@dataclass(frozen=True)
class Architecture:
    """One model of a recipe. `tokenizer` is None where its files are not on this machine."""

    name: str  # "student" or the teacher's name
    settings: ModelConfig
    source: str  # where the configuration was read
    config: Any  # transformers.PreTrainedConfig
    tokenizer: Any = None

    @property
    def text(self) -> Any:
        """The configuration of the language model itself."""
        return self.config.get_text_config()

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @property
    def vocab(self) -> int:
        """Ids that the head scores: the tokenizer's where it is here, else all rows."""
        if self.tokenizer is None:
            return int(self.text.vocab_size)
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def context(self) -> int:
        return int(getattr(self.text, "max_position_embeddings", 2**31 - 1))


def find_architecture(settings: ModelConfig, name: str) -> Architecture:
    """Look a model up without loading weights. Raises ModelError saying how to give a configuration."""
    scheme, colon, build = settings.path.partition(":")
    if colon and scheme == "testbed":
        from opdkit.testbed.tokenizer import testbed_tokenizer

        return Architecture(name, settings, "testbed", _testbed(build), testbed_tokenizer())
    if colon and scheme == "smollm2":
        from opdkit.testbed.smollm2 import folder_name, kept_layers

        if (made := cache_folder() / folder_name(build, kept_layers(build))).is_dir():
            return _from_folder(made, settings, name)
        config = _shipped("smollm2-135m", {"num_hidden_layers": len(kept_layers(build))})
        return Architecture(name, settings, "known", config)
    folder = Path(settings.path).expanduser()
    if folder.is_dir():
        return _from_folder(folder, settings, name)
    if (found := _cached(settings.path)) is not None:
        return Architecture(name, settings, "Hub cache", _read_config(found, name))
    if settings.path in _table()["models"]:
        entry = _table()["models"][settings.path]
        return Architecture(name, settings, "known", _shipped(entry["shape"], entry.get("config", {})))
    raise ModelError(
        f"the configuration of {name} '{settings.path}' is not here{nearest(settings.path, list(_table()['models']))}. To "
        "plan with this model, put its config.json into a folder and give that folder as path; nothing else is needed"
    )


def meta_model(architecture: Architecture) -> Any:
    """The model on the meta device: shapes and dtypes, no memory. Raises ModelError where transformers refuses."""
    with torch.device("meta"):
        return build(architecture, planning_attention(architecture.settings.attn))


def build(architecture: Architecture, attention: str) -> Any:
    """The untrained model of an architecture on the default device. Raises ModelError where transformers refuses."""
    from transformers import AutoModelForCausalLM

    settings = architecture.settings
    try:
        dtype = getattr(torch, settings.dtype)
        return AutoModelForCausalLM.from_config(architecture.config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        what = str(error).splitlines()[0]
        raise ModelError(
            f"{architecture.name} ({settings.path}) cannot be built with attn '{settings.attn}': {what}"
        ) from error


def shallow(architecture: Architecture, layers: int) -> Architecture:
    """The same architecture with fewer layers."""
    config = copy.deepcopy(architecture.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return replace(architecture, config=config)


def planning_attention(attn: str) -> str:
    """Flash-attention packages need not be here to plan: they keep what sdpa keeps."""
    return "sdpa" if attn.startswith("flash") else attn


def parameter_bytes(model: Any, quantize: str) -> int:
    """Bytes of a model's parameters; bitsandbytes quantises every linear layer but the vocabulary head."""
    rate = {"none": None, "nf4": NF4, "int8": INT8}[quantize]
    packed = set() if rate is None else {id(layer.weight) for layer in linear_layers(model).values()}
    return int(sum(p.numel() * (rate if id(p) in packed and rate else p.element_size()) for p in model.parameters()))


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    """Every linear layer but the vocabulary head, by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def known_models() -> dict[str, int]:
    """Hub id -> published number of parameters of every model that `models.json` describes."""
    return {name: _table()["shapes"][entry["shape"]]["parameters"] for name, entry in _table()["models"].items()}


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("opdkit.plan") / "models.json").read_text())
    return found


def _shipped(shape: str, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**(_table()["shapes"][shape]["config"] | changes))


def _testbed(name: str) -> Any:
    from transformers import Qwen3Config

    from opdkit.testbed.build import find
    from opdkit.testbed.shapes import SHAPES

    start = find(name).start
    while not start.startswith("new:"):
        start = find(start).start
    return Qwen3Config(**SHAPES[start.removeprefix("new:")])


def _from_folder(folder: Path, settings: ModelConfig, name: str) -> Architecture:
    from transformers import AutoTokenizer

    if (base := stored_base(str(folder), name)) is not None:
        found = find_architecture(settings.model_copy(update={"path": base}), name)
        return Architecture(name, settings, f"base of {folder}", found.config, found.tokenizer)
    config = _read_config(folder, name)
    has_tokenizer = any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    return Architecture(name, settings, "folder", config, tokenizer)


def _read_config(folder: Path, name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0]
        raise ModelError(f"the configuration of {name} in '{folder}' cannot be read: {what}") from error


def _cached(path: str) -> Path | None:
    """The folder of a Hub model's config.json in the Hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # not the form of a Hub id
        return None
    return Path(found).parent if isinstance(found, str) else None
