"""Settings that several names of another system make together: batch sizes, steps, clips, adapters.

A function takes the values of all its meaning's names that are known (given, or the peer's defaults), and `own`, which
reads a setting that the recipe gives in our names. It returns the value of the setting, a tuple with a value for each
setting, or MISSING; a value that cannot be raises WrongValue, whose text says what was expected.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from opdkit.aliases.values import MISSING, WrongValue, flag, integer, number, positive, share, targets

Given = Mapping[str, Any]
Own = Callable[[str], Any]


def product(given: Given, own: Own) -> Any:
    return math.prod(integer(v) for v in given.values())


def equal(given: Given, own: Own) -> float:
    values = {positive(v) for v in given.values()}
    if len(values) > 1:
        raise WrongValue("expected equal values: one temperature is the contract here")
    return values.pop()


def betas(given: Given, own: Own) -> list[float]:
    return [share(given.get("adam_beta1", 0.9)), share(given.get("adam_beta2", 0.999))]


def clip(given: Given, own: Own) -> Any:
    """(low, high); without the second name both are the first."""
    high = next((v for k, v in given.items() if k.endswith("_high")), None)
    low = next((v for k, v in given.items() if not k.endswith("_high")), 0.2)
    return number(low), number(low if high is None else high)


def clip3(given: Given, own: Own) -> tuple[float, float]:
    """verl's: clip_ratio, replaced by clip_ratio_low and clip_ratio_high where they are given."""
    ends = {key.rpartition(".")[2]: value for key, value in given.items()}
    both = ends.get("clip_ratio", 0.2)
    return number(ends.get("clip_ratio_low", both)), number(ends.get("clip_ratio_high", both))


def precision(given: Given, own: Own) -> str:
    """fp16 beats bf16 where both are on, as the peers' default for bf16 is on."""
    if given.get("fp16") is not None and flag(given["fp16"]):
        return "fp16"
    return "bf16" if given.get("bf16") is not None and flag(given["bf16"]) else "fp32"


def quantize(given: Given, own: Own) -> str:
    on = [key for key, value in given.items() if flag(value)]
    if len(on) > 1:
        raise WrongValue("expected one of them")
    return {"load_in_4bit": "nf4", "load_in_8bit": "int8"}[on[0]] if on else "none"


def every(given: Given, own: Own) -> Any:
    """A strategy and its steps; `no` is never, `epoch` is not a number of steps here."""
    (strategy,) = [v for k, v in given.items() if k.endswith("strategy")] or ["steps"]
    steps = next((v for k, v in given.items() if k.endswith("steps")), None)
    if strategy in ("no", False):  # YAML 1.1 reads no as false
        return None
    if strategy != "steps":
        raise WrongValue("expected strategy steps or no")
    return MISSING if steps is None else integer(steps)


def warmup(given: Given, own: Own) -> int:
    """Steps, or the share of all steps that a number below 1 is."""
    steps = next((v for k, v in given.items() if k.endswith("warmup_steps")), None)
    ratio = next((v for k, v in given.items() if k.endswith("ratio")), None)
    value = number(steps) if steps is not None and number(steps) > 0 else number(ratio or 0)
    if value < 1 and value > 0:
        total = next((v for k, v in given.items() if k.endswith(("max_steps", "total_training_steps"))), None)
        total = total or own("train.steps")
        if not total or number(total) <= 0:
            raise WrongValue("a share of the steps needs their number: give it, or optim.warmup_steps")
        value = math.ceil(value * number(total))
    return max(0, int(value))


def minibatches(given: Given, own: Own) -> tuple[int, int]:
    """(prompts of a rollout batch, updates that it is cut into); an update of a larger size is the whole batch."""
    prompts = integer(_needed(given, "data.train_batch_size"))
    update = integer(given.get("actor_rollout_ref.actor.ppo_mini_batch_size", prompts))
    return prompts, _parts(prompts, min(prompts, update), "ppo_mini_batch_size")


def slime_batches(given: Given, own: Own) -> tuple[int, int]:
    prompts, update = integer(_needed(given, "rollout_batch_size")), given.get("global_batch_size")
    responses = prompts * integer(given.get("n_samples_per_prompt", 1))
    return prompts, 1 if update is None else _parts(responses, integer(update), "global_batch_size")


def completions(given: Given, own: Own) -> tuple[int, int]:
    """TRL's GRPO: batch sizes count responses; a generation batch may serve several updates."""
    responses, updates = _rollouts(given)
    group = integer(given.get("num_generations", 1))
    return _parts(responses, group, "num_generations"), updates


def steps(given: Given, own: Own) -> Any:
    """Rollout batches. Epochs count only where max_steps does not, and need the number of training problems."""
    wanted = given.get("max_steps")
    if wanted is not None and number(wanted) > 0:
        updates = _rollouts(given)[1] * integer(given.get("num_iterations", 1)) if "num_generations" in given else 1
        return _parts(integer(wanted), updates, "the updates of a rollout batch")
    if given.get("num_train_epochs") is None:
        return MISSING
    per_step = _rollouts(given)[0] // integer(given.get("num_generations", 1))
    return _epochs(given["num_train_epochs"], per_step, own)


def verl_epochs(given: Given, own: Own) -> Any:
    if given.get("trainer.total_training_steps") is not None:
        return MISSING
    prompts = integer(_needed(given, "data.train_batch_size"))
    return _epochs(given["trainer.total_epochs"], prompts, own)


def swift_lora(given: Given, own: Own) -> Any:
    if given.get("tuner_type") == "full":
        return MISSING
    if given.get("tuner_type", "lora") != "lora":
        raise WrongValue("expected tuner_type lora or full")
    return _lora(given)


def swift_prompts(given: Given, own: Own) -> int:
    """Without accumulation steps ms-swift takes as many as make 16 of the batch, or one batch if that is larger."""
    batch = integer(given.get("per_device_train_batch_size", 1)) * integer(given.get("num_processes", 1))
    accumulated = given.get("gradient_accumulation_steps")
    return batch * (max(1, math.ceil(16 / batch)) if accumulated is None else integer(accumulated))


def rate(given: Given, own: Own) -> float:
    """The learning rate; ms-swift's default, `auto`, depends on what is tuned."""
    if given["learning_rate"] == "auto":
        return 1e-5 if given.get("tuner_type") == "full" else 1e-4
    return positive(given["learning_rate"])


def trl_lora(given: Given, own: Own) -> Any:
    """TRL's adapters; the fields without use_peft would do nothing there."""
    if not flag(given.get("use_peft", True)):
        if len(given) > 1:
            raise WrongValue("expected use_peft true beside the adapters' settings")
        return MISSING
    return {"rank": 16, "alpha": 32.0, "dropout": 0.05} | _lora(given)


def ranked_lora(given: Given, own: Own) -> Any:
    rank = next((v for k, v in given.items() if k.endswith("lora_rank")), None)
    return MISSING if rank in (0, None) else _lora(given)


def _lora(given: Given) -> dict[str, Any]:
    """The adapters' settings by the last part of their names."""
    ours = {"lora_r": ("rank", integer), "lora_rank": ("rank", integer), "lora_alpha": ("alpha", positive),
            "lora_dropout": ("dropout", share), "target_modules": ("targets", targets),
            "lora_target_modules": ("targets", targets), "use_rslora": ("rslora", flag)}  # fmt: skip
    found = {key.rpartition(".")[2]: value for key, value in given.items()}
    return {ours[key][0]: ours[key][1](value) for key, value in found.items() if key in ours}


def _rollouts(given: Given) -> tuple[int, int]:
    """(responses of a generation batch, updates that it serves) of TRL's batch sizes."""
    of = {k: integer(v) for k, v in given.items() if v is not None and k not in ("max_steps", "num_train_epochs")}
    device = of.get("per_device_train_batch_size", 1) * of.get("num_processes", 1)
    update = device * of.get("gradient_accumulation_steps", 1)
    whole = of.get(
        "generation_batch_size", device * of.get("steps_per_generation", of.get("gradient_accumulation_steps", 1))
    )
    return whole, _parts(whole, update, "the responses of an update")


def _needed(given: Given, name: str) -> Any:
    if name not in given:
        raise WrongValue(f"expected {name} beside it")
    return given[name]


def _parts(whole: int, part: int, name: str) -> int:
    if whole % part:
        raise WrongValue(f"{whole} is not a multiple of {part} ({name})")
    return whole // part


def _epochs(epochs: Any, per_step: int, own: Own) -> int:
    size = own("task.train_size")
    if size is None:
        raise WrongValue("epochs need the number of problems: give task.train_size, or steps")
    return math.ceil(positive(epochs) * size / per_step)


_ALL = (product, equal, betas, clip, clip3, precision, quantize, every, warmup, minibatches, slime_batches, completions,
        steps, verl_epochs, swift_lora, swift_prompts, rate, trl_lora, ranked_lora)  # fmt: skip
JOINT: dict[str, Callable[[Given, Own], Any]] = {f.__name__: f for f in _ALL}
