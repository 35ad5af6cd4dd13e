"""Two teachers as one model: the geometric mean of their distributions (`opdkit.view.TrustRegion`).

Axes: n rows, H and R columns that the two heads read, V vocabulary.

log q = (1 - share) log reference + share log teacher - log Z. Interpolated logits give the same q: a constant of a row
is normalised away. The hidden states of both stand side by side and the head reads each half with its own weights, so
every support and the chunked head work as for one model, and no weight is copied. While a chunk's logits are formed those
of the reference exist too. Left out: more than two models, and models that read different prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdkit.config import ModelConfig
from opdkit.errors import RecipeError
from opdkit.head import Head
from opdkit.models import LanguageModel
from opdkit.view import TrustRegion, View


@dataclass(frozen=True)
class InterpolatedHead(Head):
    """The head of a teacher, and that of its reference, which reads the further columns. It scores; it is not trained."""

    reference: Head | None = None
    share: float = 1.0  # the teacher's

    def logits(self, hidden: Float[Tensor, "n HR"], out: Float[Tensor, "n V"] | None = None) -> Float[Tensor, "n V"]:
        """Each head's logits, with its own scale, soft-cap and temperature, interpolated."""
        assert self.reference is not None
        width = self.weight.shape[1] + (0 if self.low_rank is None else self.low_rank.shape[1])
        z = super().logits(hidden[:, :width], out)
        return z.lerp_(self.reference.logits(hidden[:, width:]), 1 - self.share)


@dataclass
class Interpolated(LanguageModel):
    """A teacher whose distribution is pulled towards a reference; for scoring, where it stands in for one model."""

    parts: tuple[LanguageModel, ...] = ()  # teacher, reference
    share: float = 1.0

    @property
    def context_length(self) -> int:
        return min(lm.context_length for lm in self.parts)

    def head(self) -> InterpolatedHead:
        teacher, reference = (lm.head() for lm in self.parts)
        own = {f.name: getattr(teacher, f.name) for f in fields(Head)}
        return InterpolatedHead(**own, reference=reference, share=self.share)

    def run(self, **inputs: Any) -> Any:
        """The last hidden states of both, side by side, as their heads read them."""
        states = [lm.extend(lm.run(**inputs).last_hidden_state) for lm in self.parts]
        return SimpleNamespace(last_hidden_state=torch.cat(states, -1))

    def extend(self, hidden: Float[Tensor, "*rows HR"]) -> Float[Tensor, "*rows HR"]:
        return hidden


def model_of(view: View, lm: LanguageModel, teachers: Mapping[str, LanguageModel]) -> LanguageModel:
    """What scores a view's rollouts that teacher `lm` reads: `lm`, or its interpolation with the view's reference."""
    if not isinstance(view.model, TrustRegion):
        return lm
    reference = teachers[view.model.reference]
    packs = lm.packs and reference.packs
    return Interpolated(
        lm.name, lm.path, lm.model, lm.tokenizer, packs=packs, parts=(lm, reference), share=view.model.share
    )


def check_interpolated(name: str, view: View, teachers: Mapping[str, ModelConfig]) -> None:
    """Raise RecipeError where a view's two teachers are one, or would read different prompts."""
    if not isinstance(view.model, TrustRegion):
        return
    first, second = (teachers[model] for model in view.models)
    if first == second:
        raise RecipeError(
            f"view '{name}': teachers '{view.model.teacher}' and '{view.model.reference}' are both {first.path}, and a trust "
            "region between a model and itself has no effect; give them different paths, such as student:live and student:base"
        )
    for key in ("template", "template_args"):
        if getattr(first, key) != getattr(second, key):
            raise RecipeError(
                f"view '{name}' interpolates '{view.model.teacher}' and '{view.model.reference}' on one prompt, but their "
                f"{key} are {getattr(first, key)!r} and {getattr(second, key)!r}; make them equal"
            )
