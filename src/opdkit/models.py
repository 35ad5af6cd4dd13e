"""Loading causal language models and their tokenizers, and the checks that student and teacher fit together.

Left out: quantised and sharded loading, and models that are not decoder-only transformers of the transformers library.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opdkit.config import ModelConfig
from opdkit.errors import ModelError
from opdkit.head import Head


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer, its real vocabulary and its scoring temperature."""

    name: str  # "student" or the teacher's name in the recipe
    path: str
    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    temperature: float = 1.0
    forward: Callable[..., Any] | None = None  # called in place of the base model: a sharded model's entry
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
        return sum(p.numel() for p in self.model.parameters())

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
        return Head(layer.weight, bias, self.vocab, float(scale), softcap, self.temperature)

    def hidden(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Last hidden states of right-padded sequences. No mask: no real token attends to the padding after it."""
        run = self.forward or self.model.base_model
        return run(input_ids=input_ids, use_cache=False).last_hidden_state

    def check_head(self) -> None:
        """Raise ModelError unless head(hidden) gives the model's own logits (an operation we do not know about)."""
        ids = torch.arange(3, device=self.device)[None] % self.vocab
        with torch.no_grad():
            own = self.model(input_ids=ids).logits[0, :, : self.vocab].float()
            ours = self.head().at(1.0).logits(self.hidden(ids)[0])
        gap = (own - ours).abs().max().item()
        if not gap <= 1e-2 * max(1.0, own.abs().max().item()):
            raise ModelError(
                f"{self.name} ({self.path}, {type(self.model).__name__}): its logits differ from head x hidden states "
                f"by {gap:.3g}; the architecture transforms logits in a way this engine does not know"
            )


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


def load_model(config: ModelConfig, name: str, device: torch.device | str = "cpu") -> LanguageModel:
    """Load a model and its tokenizer in evaluation mode. Raises ModelError when the path or its contents are wrong."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a file is noise beside the run's own progress
    path = resolve_path(config.path)
    advice = "Give a folder made by save_pretrained, a Hub id that can be reached, or testbed:NAME"
    if (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).exists():
        raise ModelError(f"cannot load {name} from '{config.path}': no such folder. {advice}")
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below in our words
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        what = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"cannot load {name} from '{config.path}' with attn '{config.attn}': {what}. {advice}"
        ) from error
    model, report = both
    if absent := {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}:
        raise ModelError(
            f"{name} ({config.path}): {len(absent)} weights are absent or of another shape, such as {min(absent)}, and "
            "would be random; config.json and the weights do not belong together"
        )
    loaded = LanguageModel(name, config.path, model.to(device).eval(), tokenizer, config.temperature)
    _check_tokenizer(loaded)
    loaded.check_head()
    return loaded


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
