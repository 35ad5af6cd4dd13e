"""Loading causal language models and their tokenizers, and the checks that student and teacher fit together.

Left out: loading one model on several devices, and models that are not decoder-only transformers of the transformers
library. Axes: B sequences, T tokens, D hidden, H = D + rank columns where the vocabulary head has an adapter, else D.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit import products
from opdkit.config import LoraConfig, ModelConfig, Recipe
from opdkit.errors import ModelError, RecipeError
from opdkit.head import Head
from opdkit.lora import SELF_PREFIX, Adapters, attach, check_lora, load_adapters, stored_base


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, its real vocabulary and its scoring temperature."""

    name: str  # "student" or the teacher's name in the recipe
    path: str
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    temperature: float = 1.0
    forward: Callable[..., Any] | None = None  # called in place of the base model: a sharded model's entry
    adapters: Adapters | None = None
    packs: bool = False  # whether it reads packed rows (opdkit.packing)
    reads: bool = False  # whether its layers are known well enough to be written out (opdkit.reading)
    _vocab: int | None = field(default=None, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def vocab(self) -> int:
        """Real token ids: those that the tokenizer can produce; rows of the head above them are padding."""
        if self._vocab is None:  # reading a tokenizer's vocabulary costs milliseconds: once
            self._vocab = max(self.tokenizer.get_vocab().values()) + 1
        return self._vocab

    @property
    def context_length(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", 2**31 - 1))

    @property
    def parameters(self) -> int:
        """Parameters of the model, its adapters among them where they are on; quantised ones count one by one."""
        off = self.adapters is not None and not self.adapters.on
        return self.model.num_parameters() - (self.adapters.size if off and self.adapters else 0)

    @property
    def saved(self) -> Any:
        """What a checkpoint of this model holds: its adapters (a peft.PeftModel), else the whole model."""
        return self.model if self.adapters is None else self.adapters.peft

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response: the generation config's, else the tokenizer's. Raises ModelError if none."""
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise ModelError(f"{self.name} ({self.path}) names no EOS token; set sampling.eos_ids")
        return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)

    def head(self) -> Head:
        """The vocabulary head as it is now; it shares memory with the model."""
        layer = self.model.get_output_embeddings()
        scale = getattr(self.config, "logit_scale", None) or 1.0 / (getattr(self.config, "logits_scaling", None) or 1.0)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        bias = getattr(layer, "bias", None)
        low_rank = None if self.adapters is None else self.adapters.low_rank
        return Head(layer.weight, bias, self.vocab, float(scale), softcap, self.temperature, low_rank)

    def run(self, **inputs: Any) -> Any:
        """The output of the model without its head, with the adapters on or off as this model has them."""
        with self.switched():
            return (self.forward or self.model.base_model)(**inputs)

    def extend(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows H"]:
        """Hidden states as `head` reads them: with the columns of the head's adapter, where it has one."""
        return hidden if self.adapters is None else self.adapters.extend(hidden)

    def hidden(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """Last hidden states of right-padded sequences. No mask: no real token attends to the padding after it."""
        return self.extend(self.run(input_ids=input_ids, use_cache=False).last_hidden_state)

    def check_head(self) -> None:
        """Raise ModelError unless head(hidden) gives the model's own logits (an operation we do not know about)."""
        ids = torch.arange(3, device=self.device)[None] % self.vocab
        with torch.no_grad():
            with self.switched():
                own = self.model(input_ids=ids).logits[0, :, : self.vocab].float()
            ours = self.head().at(1.0).logits(self.hidden(ids)[0])
        gap = (own - ours).abs().max().item()
        if not gap <= 1e-2 * max(1.0, own.abs().max().item()):
            raise ModelError(
                f"{self.name} ({self.path}, {type(self.model).__name__}): its logits differ from head x hidden states "
                f"by {gap:.3g}; the architecture transforms logits in a way this engine does not know"
            )

    def switched(self) -> AbstractContextManager[None]:
        """Inside the block the adapters are on or off as this model has them."""
        return nullcontext() if self.adapters is None else self.adapters.switched()


def checkpoint_activations(model: Any) -> None:
    """Let a transformers model recompute its activations in the backward pass."""
    renamed = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.23
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})


def cache_folder() -> Path:
    """Where built models live: $OPDKIT_CACHE, else opdkit in the user's cache folder."""
    if "OPDKIT_CACHE" in os.environ:
        return Path(os.environ["OPDKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opdkit"


def resolve_path(path: str) -> str:
    """A folder or Hub id for a model path; `testbed:` and `smollm2:` models are built or taken from the cache.

    Raises ModelError when such a model is unknown or cannot be built.
    """
    scheme, colon, name = path.partition(":")
    if colon and scheme == "testbed":
        from opdkit.testbed.build import resolve as testbed

        return str(testbed(name, cache_folder()))
    if colon and scheme == "smollm2":
        from opdkit.testbed.smollm2 import resolve as smollm2

        return str(smollm2(name, cache_folder()))
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load_model(
    config: ModelConfig, name: str, device: torch.device | str = "cpu", lora: LoraConfig | None = None, seed: int = 0
) -> LanguageModel:
    """Load a model and its tokenizer in evaluation mode; with `lora`, with adapters that alone are trained.

    A folder that holds an adapter is loaded with its base model: to be trained on with `lora`, frozen without. Fresh
    adapters are drawn with `seed`. Raises ModelError when the path or its contents are wrong, or a target of `lora`
    matches nothing, and RecipeError when `lora` is not how a stored adapter was made.
    """
    from opdkit.packing import enable
    from opdkit.reading import agrees

    path = resolve_path(config.path)
    base = stored_base(path, name)
    model, tokenizer = _load(config, name, path, base, torch.device(device))
    adapters = None
    if base is not None:
        adapters = load_adapters(model, path, lora, name)
    elif lora is not None:
        adapters = attach(model, lora, path, name=name, seed=seed)
    products.install(model)
    loaded = LanguageModel(name, config.path, model.eval(), tokenizer, config.temperature, adapters=adapters)
    _check_tokenizer(loaded)
    loaded.check_head()
    loaded.packs = enable(loaded.model)
    loaded.reads = agrees(loaded)
    return loaded


def load_models(recipe: Recipe, device: torch.device, seed: int) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """The student and the teachers of a recipe, the teachers frozen; fresh adapters are drawn with `seed`.

    Raises ModelError and RecipeError as `load_model` and `self_teacher` do, and RecipeError for a student that has adapters or
    quantised weights in a recipe without `lora`.
    """
    from opdkit.self_teacher import check_self_teachers, self_teacher

    check_lora(recipe)
    check_self_teachers(recipe)
    student = load_model(recipe.student, "student", device, recipe.lora, seed)
    if recipe.lora is None and (student.adapters is not None or getattr(student.model, "is_quantized", False)):
        held = "an adapter" if student.adapters is not None else "quantised weights"
        raise RecipeError(f"student.path = {recipe.student.path} holds {held}, which cannot be trained as a whole model: add "
                          "`lora` to train adapters, or give a merged model (`opd export RUN --merge`)")  # fmt: skip
    teachers = {}
    for name, config in recipe.teachers.items():
        if config.path.startswith(SELF_PREFIX):
            teachers[name] = self_teacher(student, recipe.student, config, name)
        else:
            teachers[name] = load_model(config, name, device)
        if teachers[name].model is not student.model:
            teachers[name].model.requires_grad_(False)
    for lm in (student, *teachers.values()):
        lm.packs = lm.packs and recipe.train.packing
    return student, teachers


def _load(config: ModelConfig, name: str, path: str, base: str | None, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or Hub id, or of the base model of an adapter in a folder."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one bar a file is noise beside the run's own progress
    source = base or path
    shown = f"'{config.path}'" if base is None else f"'{config.path}', an adapter of '{base}',"
    advice = "Give a folder made by save_pretrained, a Hub id that can be reached, or testbed:NAME"
    if (source.startswith((".", "/")) or source.count("/") > 1) and not Path(source).exists():
        raise ModelError(f"cannot load {name} from {shown}: no such folder. {advice}".replace(",:", ":"))
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below in our words
            **_placement(config, name, device),
        )
        tokenizer = AutoTokenizer.from_pretrained(path if (Path(path) / "tokenizer_config.json").is_file() else source)
        if base is not None and (Path(path) / "generation_config.json").is_file():
            both[0].generation_config = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        what = str(error).splitlines()[0].rstrip(".")
        raise ModelError(f"cannot load {name} from {shown} with attn '{config.attn}': {what}. {advice}") from error
    model, report = both
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers follows adapters on the Hub by itself
        raise ModelError(f"{name} ({config.path}) is an adapter on the Hub; download it and give its folder")
    if absent := {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}:
        raise ModelError(
            f"{name} ({config.path}): {len(absent)} weights are absent or of another shape, such as {min(absent)}, and "
            "would be random; config.json and the weights do not belong together"
        )
    if config.quantize == "nf4" and device.type == "cpu":
        _keep_one_kernel(model)
    return (model if config.quantize != "none" else model.to(device)), tokenizer


def _keep_one_kernel(model: Any) -> None:
    """On CPUs with AVX-512 bf16 bitsandbytes packs 4-bit weights at the first pass without gradient, for products in bfloat16,
    while passes with gradient run in the model's dtype: a student would not be trained on what it samples. Small weights
    it cannot pack at all (0.50)."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _placement(config: ModelConfig, name: str, device: torch.device) -> dict[str, Any]:
    """Arguments of from_pretrained that quantise a model while it is loaded: the head stays as it is."""
    if config.quantize == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{name}: quantize = {config.quantize} needs a package: pip install 'opdkit[qlora]', or set quantize: none"
        )
    from transformers import BitsAndBytesConfig

    if config.quantize == "int8":
        # its products run in float16 whatever the dtype, and it says so at every one of them
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:  # 2305.14314: 4-bit NormalFloat, with the scales quantised as well
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        )  # fmt: skip
    return {"quantization_config": how, "device_map": {"": device}}


def _check_tokenizer(lm: LanguageModel) -> None:
    """Raise ModelError when there is no tokenizer, or one with more ids than the model has."""
    # transformers answers a folder without tokenizer files with a tokenizer that has special tokens only
    if set(lm.tokenizer.get_vocab().values()) <= set(lm.tokenizer.all_special_ids):
        raise ModelError(f"{lm.name} ({lm.path}) has no tokenizer; save the tokenizer into the model's folder")
    rows = lm.model.get_output_embeddings().weight.shape[0]
    if rows < lm.vocab:
        raise ModelError(
            f"{lm.name} ({lm.path}): the tokenizer has {lm.vocab} ids but the model only {rows} rows; "
            "use the tokenizer that belongs to the model"
        )


def check_same_vocabulary(student: LanguageModel, teacher: LanguageModel) -> None:
    """Raise ModelError unless both tokenizers give every id the same text."""
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))
    token, index = differing[0]
    raise ModelError(
        f"student ({student.path}, {len(ours)} tokens) and teacher '{teacher.name}' ({teacher.path}, {len(theirs)} "
        f"tokens) have different vocabularies: {len(differing)} entries differ, the first is id {index} {token!r}. "
        "Their distributions cannot be compared id by id; use a teacher with the student's tokenizer"
    )
