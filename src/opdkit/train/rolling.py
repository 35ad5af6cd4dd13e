"""The rollouts of every step of a run: prompts in order, this process's share of them, replayed responses, verdicts.

All processes draw the same prompts and know the same replay buffer; each makes the rollouts of its own prompts.
"""

from dataclasses import replace
from typing import Any

from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.replay import ReplayBuffer
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import prompt_keys
from opdkit.rollouts.sources import Request, Supply
from opdkit.sources import Replay
from opdkit.train.data import PromptOrder
from opdkit.train.setup import Setup, derive_seed, split_prompts


class Rolling:
    """Makes a run's rollouts, step by step; its state goes into the checkpoint."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.order = PromptOrder(len(setup.train), setup.recipe.seed)
        self.supply = Supply(
            setup.student, setup.teachers, setup.task, setup.sampling, setup.keep, setup.recipe.seed, setup.as_read_by
        )
        sources = setup.method.rollouts.items()
        self.buffers = {name: ReplayBuffer(s.capacity) for name, s in sources if isinstance(s, Replay)}

    def step(self, step: int) -> dict[str, list[Rollout]]:
        """Draw the step's prompts, roll out this process's part of them, run the method's prepare steps and verify.

        `Rollout.group` is the prompt's number among all prompts of the step.
        """
        setup, mine = self.setup, self.setup.processes.mine
        seed = derive_seed(setup.recipe.seed, "sample", step)
        requests: dict[str, Request] = {}
        numbers: list[int] = []  # of this process's prompts among all prompts of the step
        offset = 0
        for name, count in split_prompts(setup.method, setup.recipe.train.prompts_per_step).items():
            replayed = self._replayed(name, count, step)
            prompts = [] if replayed else [setup.train[i] for i in self.order.take(count)]
            keys = prompt_keys([ids for _, ids in prompts], seed)
            requests[name] = Request(setup.method.rollouts[name], mine(prompts), mine(keys), replayed)
            numbers += mine(range(offset, offset + count))
            offset += count
        with setup.autocast():
            found = self.supply.roll_out(requests, version=step - 1)
        for name, rollouts in found.items():
            verified = verify_rollouts(setup.task, rollouts) if name == "policy" else rollouts
            for prepare in setup.method.prepare:
                verified = prepare(verified)
            found[name] = [replace(r, group=numbers[r.group]) for r in verified]
        self._remember(found)
        return found

    def _replayed(self, name: str, prompts: int, step: int) -> list[Rollout]:
        """This process's part of what the buffer gives for some prompts; nothing where it holds too little."""
        if name not in self.buffers:
            return []
        group = self.setup.sampling.group
        seed = derive_seed(self.setup.recipe.seed, "replay", name, step)
        drawn = self.buffers[name].draw(prompts * group, seed)
        rows = [drawn[i : i + group] for i in range(0, len(drawn), group)]
        return [r for row in self.setup.processes.mine(rows) for r in row]

    def _remember(self, found: dict[str, list[Rollout]]) -> None:
        """Put all processes' fresh samples into every buffer, in the order that one process would have."""
        if not self.buffers:
            return
        fresh = [replace(r, capture=None) for rollouts in found.values() for r in rollouts if r.capture is not None]
        every = sorted(self.setup.processes.gather(fresh), key=lambda r: r.group)
        for buffer in self.buffers.values():
            buffer.add(every)

    def state(self) -> dict[str, Any]:
        return {"order": self.order.state(), "replay": {name: b.state() for name, b in self.buffers.items()}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises RunError when the task or the seed is another one."""
        self.order = PromptOrder.restore(len(self.setup.train), self.setup.recipe.seed, saved["order"])
        problems = {p.id: p for p in self.setup.train.problems} if self.buffers else {}
        self.buffers = {name: ReplayBuffer.restore(state, problems) for name, state in saved["replay"].items()}
