"""Exporting a run: a folder that transformers or peft loads, with tokenizer, generation config and model card.

Weights are copied from a checkpoint, byte by byte unless another dtype is asked for, or adapters are merged into their
base model. The folder appears under its name when it is complete; an existing one is never touched. Left out: uploading.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from opdkit.config import ModelConfig, Recipe, load_recipe
from opdkit.errors import RecipeError, RunError
from opdkit.lora import ADAPTER_CONFIG, Adapters, load_adapters, stored_base
from opdkit.report.read import RunData, read_run
from opdkit.train.card import model_card
from opdkit.train.checkpoint import checkpoint_step, checkpoints
from opdkit.train.run import sync, writing

DTYPES = get_args(ModelConfig.model_fields["dtype"].annotation)


def export(
    run: Path, *, step: int | None = None, to: Path | None = None, merge: bool = False, dtype: str | None = None
) -> Path:
    """Write the student of a run as a folder of its own and return that folder (RUN/export unless `to` is given).

    Of a run with adapters the adapter is exported, or with `merge` the whole model; `dtype` changes the precision of what
    is stored. Raises RunError when `run` is not a run, is unfinished and no `step` is named, has no such checkpoint,
    or when the folder exists or cannot be written; RecipeError for a setting that cannot be or has no effect.
    """
    data = read_run(run)
    recipe = load_recipe(str(run / "recipe.yaml"))
    checkpoint = _choose(data, step)
    adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype = {dtype}; expected {', '.join(DTYPES)}")
    if merge and not adapter:
        raise RecipeError(
            f"--merge has no effect: {run} trained all weights, there is no adapter to merge; leave it out"
        )
    target = run / "export" if to is None else to.expanduser()
    if target.exists():
        raise RunError(f"{target} exists and is not overwritten; give another folder with --to, or delete it")
    steps = checkpoint_step(checkpoint)  # and that its files are whole
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            _copy(checkpoint, folder, None if merge else dtype, without_weights=merge)
            if merge:
                _merged(recipe, checkpoint, dtype or recipe.student.dtype).save_pretrained(folder)
            _generation_config(recipe, checkpoint).save_pretrained(folder)
            card = model_card(data, recipe, steps, str(target), adapter=adapter and not merge)
            (folder / "README.md").write_text(card, encoding="utf-8")
            for path in [*folder.iterdir(), folder]:
                sync(path)
            os.rename(folder, target)  # fails where somebody else was faster
            sync(target.parent)
    return target


def _choose(run: RunData, step: int | None) -> Path:
    """The checkpoint of a step; the last one of a finished run."""
    found = {int(path.name.split(".")[0].removeprefix("step-")): path for path in reversed(checkpoints(run.folder))}
    if not found:
        raise RunError(f"{run.folder} has no complete checkpoint to export; go on with `opd train RECIPE --resume`")
    listed = ", ".join(map(str, sorted(found)))
    if step is not None and step not in found:
        raise RunError(f"{run.folder} has no checkpoint of step {step}; its checkpoints are of step {listed}")
    if step is None and run.info.finished is None:
        raise RunError(
            f"{run.folder} is not finished: finish it with `opd train RECIPE --resume`, or export a checkpoint as it is with "
            f"--step {max(found)} (there are {listed})"
        )
    return found[max(found) if step is None else step]


def _copy(checkpoint: Path, folder: Path, dtype: str | None, *, without_weights: bool) -> None:
    """Copy a checkpoint's files but for the trainer's; with a dtype the weights, and what config.json says of them."""
    total = 0
    for file in sorted(path for path in checkpoint.iterdir() if path.is_file()):
        if without_weights and file.name.startswith("adapter_"):
            continue
        if dtype is not None and file.suffix == ".safetensors":
            total += _cast(file, folder / file.name, dtype)
        else:
            shutil.copyfile(file, folder / file.name)
    if dtype is not None and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(_with_dtype(config, dtype), indent=2) + "\n", encoding="utf-8")
    index = folder / "model.safetensors.index.json"
    if dtype is not None and index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_size"] = total
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cast(source: Path, target: Path, dtype: str) -> int:
    """Copy a file of weights with every number of the given precision; returns the bytes of its weights."""
    import torch
    from safetensors.torch import load_file, save_file

    wanted = getattr(torch, dtype)
    weights = {k: v.to(wanted) if v.is_floating_point() else v for k, v in load_file(source).items()}
    save_file(weights, target, metadata={"format": "pt"})
    return sum(v.numel() * v.element_size() for v in weights.values())


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config with every `dtype` in it, also of a part of the model, set to another one."""
    if not isinstance(config, dict):
        return config
    return {key: dtype if key == "dtype" else _with_dtype(value, dtype) for key, value in config.items()}


def _merged(recipe: Recipe, checkpoint: Path, dtype: str) -> Any:
    """The base model with the adapters of a checkpoint added to its weights, in float32, rounded once to `dtype`.

    The base has the precision in which it was trained: quantised weights are those that the adapters were trained on.
    """
    import torch

    from opdkit.models import load_model

    base = recipe.student.model_copy(update={"path": str(stored_base(str(checkpoint), "student"))})
    model = load_model(base, "student").model
    if base.quantize != "none":
        model = model.dequantize()
    adapters = load_adapters(model.float(), str(checkpoint), None, "student")
    _untie(model, adapters)
    return adapters.peft.merge_and_unload().to(getattr(torch, dtype))


def _untie(model: Any, adapters: Adapters) -> None:
    """Give an adapted head a weight of its own: merged into a tied one, the adapter would change the embedding too."""
    import torch

    if adapters.head is None:
        return
    layer = adapters.head.get_base_layer()
    if layer.weight is model.get_input_embeddings().weight:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _generation_config(recipe: Recipe, checkpoint: Path) -> Any:
    """The checkpoint's generation config with the recipe's sampling: temperature, cuts and the ids that end a response."""
    from transformers import AutoTokenizer, GenerationConfig

    s = recipe.sampling
    config = GenerationConfig.from_pretrained(checkpoint)
    config.update(do_sample=True, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if s.eos_ids is not None or config.eos_token_id is None:
        config.eos_token_id = s.eos_ids or tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config
