"""Rollout sources as values: where the responses of a step come from. `rollouts.sources` makes the rollouts.

Every source has `share`, its part of the step's prompts; the shares of a method add up to 1.
"""

from dataclasses import dataclass

from opdkit.values import Value


@dataclass(frozen=True, repr=False)
class OnPolicy(Value):
    """The student samples its own responses.

    With `mixed_with`, a teacher's name, every token is drawn from mix x teacher + (1 - mix) x student (MiniLLM's
    teacher-mixed sampling, 2306.08543 Eq. 6). View "behaviour" then holds the log-probs of that mixture, and a policy
    gradient needs a weight that reads them.
    """

    share: float = 1.0
    mixed_with: str | None = None
    mix: float = 0.0  # the teacher's share of the mixture, in [0, 1)

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix < 1.0 or (self.mix > 0) != (self.mixed_with is not None):
            raise ValueError(
                f"OnPolicy(mixed_with={self.mixed_with!r}, mix={self.mix}): give a teacher's name and its share "
                "strictly between 0 and 1, or neither"
            )


@dataclass(frozen=True, repr=False)
class Dataset(Value):
    """The task's own target responses stand as rollouts."""

    share: float = 1.0


@dataclass(frozen=True, repr=False)
class TeacherSamples(Value):
    """A teacher's responses, sampled once per prompt and kept on disk; temperature 0 is greedy."""

    share: float = 1.0
    teacher: str = "teacher"
    temperature: float = 1.0


@dataclass(frozen=True, repr=False)
class Replay(Value):
    """Responses that the student sampled in earlier steps, newest `capacity` of them kept, drawn without replacement.

    A step for which the buffer holds too few takes fresh student samples in their place. Its state is saved.
    """

    share: float = 1.0
    capacity: int = 1024  # rollouts

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"Replay(capacity={self.capacity}): expected at least 1 rollout")


Source = OnPolicy | Dataset | TeacherSamples | Replay
