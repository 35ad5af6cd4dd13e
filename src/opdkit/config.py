"""The recipe: every setting of a run with its type, default and unit, validated before anything heavy is imported.

A recipe is a YAML file; dotted overrides (`train.steps=100`) are applied on top. An unknown key fails and names the
nearest valid one. This module must import neither torch nor transformers: `opd --help` reads it.
"""

import difflib
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opdkit.errors import RecipeError
from opdkit.overrides import apply_override, parse_override

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
BadScores = Literal["stop", "mask"]
HeadKernel = Literal["torch", "triton"]
SOURCE = {
    "testbed": "name",
    "reasoning_gym": "name",
    "file": "path",
    "dataset": "path",
    "verifiers": "path",
}  # of a task
LOG = logging.getLogger("opdkit.recipe")  # the command line prints it


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    path: str = Field(
        description="folder, Hub id, `testbed:NAME` or `smollm2:NAME`; teachers also `student:base`, the student as it "
        "was before training, `student:live`, its current weights, and `student:ema`, their average"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="parameter precision")
    attn: str = Field("sdpa", description="attention implementation of transformers")
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="bitsandbytes weights; a quantised student needs `lora`"
    )
    temperature: float = Field(1.0, gt=0, description="teachers only: logits are divided by it when scoring")
    ema: float | None = Field(
        None, gt=0, le=1, description="`student:ema` only: share of the new weights at every update; None = 0.05"
    )
    template: Literal["student", "own"] = Field(
        "student", description="teachers only: own = the teacher reads the prompt through its own chat template"
    )
    template_args: dict[str, Any] = Field({}, description="arguments of that template, such as {enable_thinking: true}")


class LoraConfig(Section):
    rank: Positive = Field(16, description="rank of every adapter")
    alpha: float = Field(32.0, gt=0, description="scale: the update is alpha / rank x B A")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' input while training")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="module names; all-linear = every linear layer but the vocabulary head"
    )
    rslora: bool = Field(False, description="scale alpha / sqrt(rank) instead")


class MethodConfig(Section):
    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="a method of `opd methods`; the other keys are that method's arguments")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TaskConfig(Section):
    kind: Literal["testbed", "reasoning_gym", "file", "dataset", "verifiers"] = Field(
        description="where prompts come from"
    )
    name: str | None = Field(None, description="testbed or reasoning-gym task, or Hub configuration of a `dataset`")
    path: str | None = Field(
        None, description="file (.jsonl, .parquet), Hub id / folder of a `dataset`, or module:function"
    )
    eval_path: str | None = Field(
        None, description="`file` only: evaluation file; otherwise eval_size rows are held out"
    )
    split: str = Field("train", description="`dataset` only: training split")
    eval_split: str | None = Field(None, description="`dataset` only: evaluation split; otherwise rows are held out")
    format: Literal["columns", "verl", "dapo", "deepmath", "openthoughts3", "gsm8k"] = Field(
        "columns", description="`file` and `dataset` only: a known layout of columns, or `columns`: as mapped there"
    )
    columns: dict[str, str] = Field(
        {}, description="our column name -> the file's: prompt, answer, response, domain, system, tools, id"
    )
    settings: dict[str, Any] = Field(
        {}, description="difficulty of a testbed or reasoning-gym task; arguments of a verifiers environment"
    )
    train_size: Positive | None = Field(None, description="training problems; None = all rows (generated tasks: 10000)")
    eval_size: Positive = Field(200, description="held-out problems")
    seed: int = Field(0, ge=0, description="seed of generated tasks and of the hold-out; train and eval never overlap")
    verifier: Literal["auto", "math", "exact", "none"] = Field("auto", description="auto = the task's own, else math")
    verifier_errors: Literal["stop", "incorrect"] = Field(
        "stop", description="a verifier that raises: stop the run, or count the response as incorrect and log how many"
    )
    upsample: str | None = Field(
        None, description="file that `opd difficulty` wrote: prompts of its smaller buckets come up more often"
    )
    upsample_shape: Literal["u", "j"] | None = Field(
        None, description="with `upsample`: u repeats prompts solved sometimes, j also those solved always; None = u"
    )
    system: str | None = Field(None, description="system prompt for rows that have none")
    template: Literal["chat", "plain"] = Field("chat", description="chat = tokenizer's chat template; plain = raw text")
    template_args: dict[str, Any] = Field(
        {}, description="arguments of the chat template, such as {enable_thinking: false}"
    )
    max_prompt_tokens: Positive = Field(1024, description="tokens; the limit for one prompt")
    overlong: Literal["error", "drop"] = Field("error", description="what a prompt over the limit does")


class SamplingConfig(Section):
    group: Positive = Field(1, description="responses per prompt")
    max_new_tokens: Positive = Field(256, description="tokens")
    temperature: float = Field(1.0, gt=0, description="sampling and student scoring temperature (one contract)")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 = off")
    top_k: int = Field(0, ge=0, description="0 = off")
    stop: list[str] = Field([], description="stop strings; the text ends with the first one found")
    eos_ids: list[int] | None = Field(None, description="token ids that end a response; None = the model's own")
    max_rows: Positive = Field(256, description="sequences that decode together")
    rescore: bool = Field(
        False, description="score samples again with the student and log the gap to the captured log-probs"
    )


class ToolsConfig(Section):
    environment: str = Field(description="calculator, python, verifiers, or your own as package.module:function")
    settings: dict[str, Any] = Field({}, description="arguments of the environment")
    calls: Literal["template", "text"] = Field(
        "template", description="template = <tool_call> blocks and the chat template's tool messages; text = CALL lines"
    )
    show: Literal["template", "system"] = Field(
        "template", description="how a chat model learns of the tools: its template shows them, or a system prompt does"
    )
    turns: Positive = Field(8, description="turns of one response; a call at the end of the last one is not run")
    seconds: float = Field(10.0, gt=0, description="seconds for one call; later answers count as errors")
    characters: Annotated[int, Field(ge=64)] = Field(
        2000, description="characters of one answer; its middle is cut out"
    )
    workers: Positive = Field(8, description="calls that run at the same time")


class OptimConfig(Section):
    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW, matrices only")
    grad_clip: float = Field(1.0, gt=0, description="global gradient norm")


class TrainConfig(Section):
    steps: Positive = Field(100, description="rollout batches; one optimiser update each unless the next two say more")
    prompts_per_step: Positive = Field(16, description="prompts")
    minibatches: Positive = Field(1, description="parts of a rollout batch; one optimiser update for each")
    epochs: Positive = Field(1, description="passes over a rollout batch")
    sharding: Literal["none", "fsdp2"] = Field(
        "none", description="several processes: none = every process holds the student; fsdp2 = they share it"
    )
    microbatch_tokens: Positive = Field(
        16384, description="tokens of one student forward: padding counts, a packed prompt once"
    )
    score_tokens: Positive = Field(
        32768, description="tokens of one teacher forward: padding counts, a packed prompt once"
    )
    score_ahead: bool = Field(
        False, description="teachers read a finished wave of responses in a second thread while the next is sampled"
    )
    packing: bool = Field(
        True, description="where the model can: a group's prompt once, no padding; false = padded rows always"
    )
    head_chunk: Positive | None = Field(
        None, description="rows of logits held at once; None = chosen from the vocabulary"
    )
    head_kernel: HeadKernel = Field(
        "torch", description="triton = one fused kernel for a KL over the whole vocabulary; CUDA only"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="arithmetic of forward passes (accelerate)")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    bad_scores: BadScores = Field(
        "stop", description="NaN or infinite log-probs of a teacher: stop, batch saved, or leave these tokens out"
    )
    reduction: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] | None = (
        Field(None, description="overrides every term's own reduction")
    )
    checkpoint_every: Positive | None = Field(None, description="steps; None = only at the end")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that stay on disk")


class EvalConfig(Section):
    every: Positive | None = Field(None, description="steps; None = before and after only")
    samples: Positive = Field(1, description="responses per problem (avg@k)")
    temperature: float = Field(1.0, ge=0, description="0 = greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 = off")
    max_new_tokens: Positive | None = Field(None, description="tokens; None = as in training")
    teacher: bool = Field(True, description="also evaluate the teachers once")
    kl_prompts: int = Field(64, ge=0, description="held-out prompts for the exact reverse KL; 0 = off")


class LogConfig(Section):
    top_k: Positive = Field(16, description="k of overlap ratio, overlap mass and overlap-token advantage")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="JSONL is always written"
    )
    rollouts_every: Positive = Field(25, description="steps between rollouts kept for the report's token viewer")
    rollouts: Positive = Field(4, description="rollouts kept each time")


class Recipe(Section):
    method: MethodConfig
    student: ModelConfig
    teachers: dict[str, ModelConfig] = Field({}, description="name -> model; the method's views use these names")
    lora: LoraConfig | None = Field(None, description="train adapters instead of the whole student; {} = its defaults")
    task: TaskConfig
    tools: ToolsConfig | None = Field(None, description="tools that the student calls while it writes a response")
    sampling: SamplingConfig = SamplingConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    seed: int = Field(0, ge=0, description="seed of data order and sampling")
    output: str = Field("runs/train", description="run folder")

    @model_validator(mode="after")
    def _check_task(self) -> "Recipe":
        if getattr(self.task, (needs := SOURCE[self.task.kind])) is None:
            raise ValueError(f"task.kind '{self.task.kind}' needs task.{needs}")
        return self


def section_of(kind: Any) -> type[BaseModel] | None:
    """The section that an annotation stands for, also behind `| None`."""
    found = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Section)]
    return found[0] if found and get_origin(kind) in (None, Union, UnionType) else None


def recipe_path(name: str) -> Path:
    """Find a recipe by path, or by name among those in the package (`cpu/demo`).

    Raises RecipeError when neither exists, naming the recipes that do.
    """
    if Path(name).is_file():
        return Path(name)
    root = Path(str(resources.files("opdkit") / "recipes"))
    shipped = root / name.removeprefix("recipes/").removesuffix(".yaml")
    if shipped.with_suffix(".yaml").is_file():
        return shipped.with_suffix(".yaml")
    known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    raise RecipeError(f"no recipe file '{name}'; give a path to a YAML file or one of: {', '.join(known)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=c` overrides (values are YAML) and validate it. Raises RecipeError.

    Names of other systems (`opdkit.aliases`) are translated in both; each step is logged to "opdkit.recipe".
    """
    return parse_recipe(recipe_data(name, overrides))


def recipe_data(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe and overrides as a mapping in our names, not yet validated. Raises RecipeError."""
    from opdkit.aliases import translate  # it reads the fields that this module defines

    path = recipe_path(name)
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds {type(data).__name__}, expected a mapping of sections: method, student, ...")
    translation = translate(data, dict(parse_override(override) for override in overrides))
    data = translation.data
    for line in translation.lines:
        LOG.info(line)
    for key in ("path", "eval_path", "upsample"):  # a data file that a recipe ships lies beside it
        beside = path.parent / str(data["task"].get(key)) if isinstance(data.get("task"), dict) else None
        if beside is not None and beside.is_file():
            data["task"][key] = str(beside.resolve())
    for key, value in translation.pairs.items():
        apply_override(data, key, value)
    return data


def parse_recipe(data: dict[str, Any]) -> Recipe:
    """Validate a recipe given as a mapping in our names. Raises RecipeError with one line for each wrong field."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(problem) for problem in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = Recipe
        for part in problem["loc"][:-1]:
            info = section.model_fields.get(str(part))
            if info is None:  # the name of a teacher
                section = ModelConfig
            elif (inner := section_of(info.annotation)) is not None:
                section = inner
        return f"unknown key '{where}'{nearest(str(problem['loc'][-1]), list(section.model_fields))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    if problem["type"] == "value_error":
        return message
    if problem["type"] in ("model_type", "dict_type"):
        message = "expected a mapping of settings"
    return f"'{where}' = {problem['input']!r}: {message}"


def nearest(given: str, known: Sequence[str]) -> str:
    """A hint for a wrong name: `: did you mean 'x'?`, or the list of the known ones."""
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f": did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"
