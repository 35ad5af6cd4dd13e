"""Views as values: who scores, having read what, on which tokens. `opdkit.views` computes their scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from opdkit.contexts import Context
from opdkit.errors import MethodError
from opdkit.serialise import register
from opdkit.support import Sampled, Support
from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class TrustRegion(Value):
    """Two teachers as one: q(v) = reference(v)^(1 - share) teacher(v)^share / Z at every position, over the whole vocabulary.

    SDPO's "trust-region" teacher (2601.20802) with the student as the teacher and the student before training as the
    reference: the distribution nearest to the reference within a bound on KL(q, teacher), for which `share` stands. 1 is
    the teacher, 0 the reference. Both read what the view's context shows. Default: the released code's; the paper's is 0.01.
    """

    teacher: str = "teacher"
    reference: str = "reference"
    share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise MethodError(
                f"TrustRegion(share={self.share}): expected the teacher's share, from 0 (the reference) to 1 (the teacher)"
            )
        if self.teacher == self.reference:
            raise MethodError(
                f"TrustRegion: teacher and reference are both '{self.teacher}', which is that teacher alone; name another "
                "teacher of the recipe as the reference"
            )


@dataclass(frozen=True)
class View:
    """Who scores, having read what, on which tokens.

    A mapping {domain: teacher} gives each rollout the teacher of its problem's domain; `*` stands for all other domains.
    """

    # "student" or a teacher's name in the recipe, one for each domain, or two that are interpolated
    model: str | Mapping[str, str] | TrustRegion
    support: Support = Sampled()
    context: Literal["own"] | Context = "own"  # own: the model reads the rollout's own prompt

    def __post_init__(self) -> None:
        if not self.models:
            raise MethodError(f"{self}: its model names no teacher; give one name, or {{domain: teacher, ...}}")

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all its models, each once."""
        if isinstance(self.model, TrustRegion):
            return (self.model.teacher, self.model.reference)
        return tuple(dict.fromkeys([self.model] if isinstance(self.model, str) else self.model.values()))

    @property
    def routes(self) -> str | Mapping[str, str]:
        """Whose prompt the rollouts are given: one teacher's, or that of each domain's."""
        return self.model.teacher if isinstance(self.model, TrustRegion) else self.model

    @property
    def part(self) -> float:
        """The part of the rollouts that each of its models reads, where all domains are as frequent."""
        return 1 / len(self.models) if isinstance(self.model, Mapping) else 1.0


register(View, TrustRegion)
