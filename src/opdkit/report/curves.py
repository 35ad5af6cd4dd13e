"""The catalogue of curves: which metrics make one chart, under which heading, and the sentence that explains it.

A chart appears when the run has one of its metrics. `NAME/x` metrics (several teachers) become further lines of the
chart of `NAME`. Metrics that no chart names are shown at the end under their own names.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["share", "number"]


@dataclass(frozen=True)
class Line:
    """One metric of a chart. `colour` is a CSS variable of report.css."""

    key: str
    name: str
    colour: str = "student"
    dash: str = "solid"


@dataclass(frozen=True)
class Curve:
    """One chart: its lines, unit, and one sentence on what it is and what good looks like."""

    group: str
    title: str
    unit: str
    text: str
    lines: tuple[Line, ...]
    kind: Kind = "number"
    from_zero: bool = True
    stacked: bool = False
    smooth: bool = True  # False: a schedule or a maximum, which a rolling mean would misstate
    source: Literal["metrics", "evals"] = "metrics"


LEARNING = "Learning"
AGREEMENT = "Agreement with the teacher"
LENGTHS = "Lengths and rewards"
SPEED = "Speed and memory"
OTHER = "Other metrics of this run"

CURVES: tuple[Curve, ...] = (
    Curve(
        LEARNING,
        "Held-out accuracy",
        "share correct",
        "Share of held-out problems answered correctly, with one standard error; "
        "good is a student that climbs to the dashed line of its teacher.",
        (Line("accuracy", "student"),),
        kind="share",
        source="evals",
    ),
    Curve(
        LEARNING,
        "Loss",
        "the method's units",
        "What the optimiser minimises, averaged over the step's tokens; compare it within this run only, "
        "because an on-policy loss may stay flat while the student improves.",
        (Line("loss", "loss"),),
        from_zero=False,
    ),
    Curve(
        LEARNING,
        "Gradient norm",
        "before clipping",
        "Length of the whole gradient before clipping; good is steady or slowly falling, and spikes warn of instability.",
        (Line("grad_norm", "gradient norm"),),
    ),
    Curve(
        LEARNING,
        "Learning rate",
        "per step",
        "Step size of the optimiser after warm-up and schedule; it should look like what the recipe asks for.",
        (Line("lr", "learning rate"),),
        smooth=False,
    ),
    Curve(
        LEARNING,
        "Sampler gap",
        "nats/token",
        "Mean distance between the log-probs that the sampler used and those of the student being trained; good is near 0, "
        "because a gap means that the responses are not quite the student's own.",
        (Line("sampler_gap", "gap"),),
    ),
    Curve(
        AGREEMENT,
        "Held-out reverse KL",
        "nats/token",
        "Exact KL(student ‖ teacher) over the whole vocabulary on held-out prompts; good falls towards 0, "
        "where the student writes as the teacher would.",
        (Line("reverse_kl", "student"),),
        source="evals",
    ),
    Curve(
        AGREEMENT,
        "Reverse KL on the rollouts",
        "nats/token",
        "KL(student ‖ teacher) estimated from the tokens that were sampled in this step, so noisy and at times below 0; "
        "good falls towards 0.",
        (Line("reverse_kl", "reverse KL"),),
    ),
    Curve(
        AGREEMENT,
        "Overlap ratio",
        "share of top-k",
        "Share of the student's k most likely tokens that are also among the teacher's; "
        "good rises towards 100%, and the dotted line is what random lists would share.",
        (Line("overlap_ratio", "overlap"), Line("overlap_chance", "chance", "soft", "dot")),
        kind="share",
    ),
    Curve(
        AGREEMENT,
        "Overlap mass",
        "probability",
        "Probability that each model puts on the top-k tokens that both share; "
        "good is near 100% for both, so that the shared tokens are the ones that matter.",
        (Line("overlap_mass_student", "student"), Line("overlap_mass_teacher", "teacher", "teacher", "dash")),
        kind="share",
        from_zero=False,
    ),
    Curve(
        AGREEMENT,
        "Overlap-token advantage",
        "nats/token",
        "How far the two models disagree about the shared top-k tokens; never above 0, and good rises towards 0.",
        (Line("overlap_token_advantage", "advantage"),),
    ),
    Curve(
        AGREEMENT,
        "Entropy",
        "nats/token",
        "How undecided each model is about the next token; good is a student that meets its teacher, "
        "while a student that falls to 0 early has stopped exploring.",
        (Line("entropy_student", "student"), Line("entropy_teacher", "teacher", "teacher", "dash")),
    ),
    Curve(
        AGREEMENT,
        "Entropy gap",
        "nats/token",
        "Distance between the two entropies at the same position; good shrinks towards 0.",
        (Line("entropy_gap", "gap"),),
    ),
    Curve(
        LENGTHS,
        "Reward",
        "mean of the verifier",
        "Mean reward of the responses sampled in this step; good rises, even where the method does not train on it.",
        (Line("reward", "reward"),),
        from_zero=False,
    ),
    Curve(
        LENGTHS,
        "Training accuracy",
        "share correct",
        "Share of the responses sampled in this step that are correct; good rises, and it is noisier than the "
        "held-out accuracy because every step has other prompts.",
        (Line("accuracy", "accuracy"),),
        kind="share",
    ),
    Curve(
        LENGTHS,
        "Response length",
        "tokens",
        "Mean length of a sampled response; good settles near the teacher's length, and steady growth is a warning.",
        (Line("response_length", "length"),),
    ),
    Curve(
        LENGTHS,
        "Clipped share",
        "share of responses",
        "Share of responses cut off by the length limit before they ended; good is near 0%.",
        (Line("clipped_share", "clipped"),),
        kind="share",
    ),
    Curve(
        LENGTHS,
        "Tokens of a step",
        "trained tokens",
        "Response tokens that the loss of this step was averaged over; good is steady, since it follows the response length.",
        (Line("tokens", "tokens"),),
    ),
    Curve(
        SPEED,
        "Throughput",
        "tokens/s",
        "Response tokens that went through a whole step each second; higher is better, and dips mean long responses.",
        (Line("tokens_per_second", "throughput"),),
    ),
    Curve(
        SPEED,
        "Time of a step",
        "seconds",
        "Seconds that each phase of a step took, stacked; good has almost nothing outside sampling, scoring and updating.",
        (
            Line("seconds/sample", "sample", "student"),
            Line("seconds/score", "score", "teacher"),
            Line("seconds/update", "update", "third"),
            Line("seconds/other", "other", "soft"),
        ),
        stacked=True,
    ),
    Curve(
        SPEED,
        "Peak memory",
        "MB",
        "Largest memory in use up to this step; good is flat after the first steps.",
        (Line("peak_memory_mb", "memory"),),
        smooth=False,
    ),
)

GROUPS: tuple[str, ...] = (LEARNING, AGREEMENT, LENGTHS, SPEED, OTHER)
SILENT = frozenset({"step", "seconds/step"})  # the axis, and the sum of what "Time of a step" stacks
