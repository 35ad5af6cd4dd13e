"""The rollouts of every step of a run: prompts in order, this process's share of them, replayed responses, verdicts.

All processes draw the same prompts and know the same replay buffer; each makes the rollouts of its own prompts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from opdkit.errors import RunError
from opdkit.method import View
from opdkit.prepare import Batch
from opdkit.rewards.verify import verify_rollouts
from opdkit.rollouts.replay import ReplayBuffer
from opdkit.rollouts.rollout import Rollout
from opdkit.rollouts.sampler import prompt_keys
from opdkit.rollouts.sources import Request, Supply
from opdkit.sources import Replay
from opdkit.train.ahead import Ahead, Reading, without_states
from opdkit.train.checks import split_prompts
from opdkit.train.data import PromptOrder
from opdkit.train.setup import Setup, derive_seed


class Rolling:
    """Makes a run's rollouts, step by step; its state goes into the checkpoint."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pool = setup.pool or range(len(setup.train))
        self.order = PromptOrder(len(self.pool), setup.recipe.seed)
        self.judged: list[Rollout] = []  # the step's rollouts of the source "policy" before the prepare steps
        self.supply = Supply(
            setup.student, setup.teachers, setup.task, setup.sampling, setup.keep, setup.recipe.seed, setup.as_read_by,
            views=setup.method.views, top_list=setup.method.top_list, tools=setup.tools,
        )  # fmt: skip
        views = setup.read_ahead if setup.recipe.train.score_ahead else {}
        self.ahead = Ahead(views, self._read, setup.recipe.train.score_tokens, setup.autocast, setup.student.device)
        sources = setup.method.rollouts.items()
        self.buffers = {name: ReplayBuffer(s.capacity) for name, s in sources if isinstance(s, Replay)}

    def step(self, step: int, state: Mapping[str, Any] | None = None) -> dict[str, list[Rollout]]:
        """Draw the step's prompts, roll out this process's part of them, verify and run the method's prepare steps.

        `state` is that of the method's controllers, which may lower the response limit. `Rollout.group` is the prompt's number
        among all prompts of the step.
        """
        setup, mine = self.setup, self.setup.processes.mine
        seed, limit = derive_seed(setup.recipe.seed, "sample", step), self._limit(state or {})
        requests: dict[str, Request] = {}
        numbers: list[int] = []  # of this process's prompts among all prompts of the step
        offset = 0
        for name, count in split_prompts(setup.method, setup.recipe.train.prompts_per_step).items():
            replayed = self._replayed(name, count, step)
            prompts = [] if replayed else setup.train.many(self.pool[i] for i in self.order.take(count))
            keys = prompt_keys([ids for _, ids in prompts], seed)
            requests[name] = Request(setup.method.rollouts[name], mine(prompts), mine(keys), replayed, limit)
            numbers += mine(range(offset, offset + count))
            offset += count
        with self.ahead as ahead:
            with setup.autocast():
                found = self.supply.roll_out(requests, step - 1, ahead.take if ahead.views else None)
            if "policy" in found:
                found["policy"] = verify_rollouts(setup.task, found["policy"])
                self.judged = without_states(found["policy"])
            found = {name: ahead.attach(name, rollouts) for name, rollouts in found.items()}
        for name, rollouts in found.items():
            if name == "policy":
                prepared = self._prepared(rollouts, limit, step)
            else:
                prepared = setup.shown(setup.method.rollouts[name], rollouts)
            if numbers != list(range(len(numbers))):  # copies cost milliseconds
                prepared = [replace(r, group=numbers[r.group]) for r in prepared]
            found[name] = prepared
        self._remember(found)
        return found

    def _read(self, name: str, view: View, rollouts: list[Rollout]) -> list[Reading]:
        return self.setup.readers(name, view, rollouts, self.setup.told(view, rollouts))

    def _prepared(self, rollouts: list[Rollout], limit: int, step: int) -> list[Rollout]:
        """What the method's prepare steps make of the judged rollouts."""
        found, batch = rollouts, Batch(limit, derive_seed(self.setup.recipe.seed, "prepare", step))
        for prepare in self.setup.method.prepare:
            found = prepare(found, batch)
        return found or [replace(r, dropped=True) for r in rollouts]  # a step needs tokens: these get weight 0

    def _limit(self, state: Mapping[str, Any]) -> int:
        """Response tokens of the step: the recipe's, or the least that a controller says."""
        said = [c.response_limit(state[c.name]) for c in self.setup.method.controllers if c.name in state]
        return min([self.supply.how.max_new_tokens, *(limit for limit in said if limit is not None)])

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
        fresh = [
            replace(r, capture=None, states={})
            for rollouts in found.values()
            for r in rollouts
            if r.capture is not None
        ]
        every = sorted(self.setup.processes.gather(fresh), key=lambda r: r.group)
        for buffer in self.buffers.values():
            buffer.add(every)

    def _repeated(self) -> dict[str, Any]:
        """What a checkpoint says about repeated prompts."""
        return {"repeated": derive_seed(*self.pool)} if self.setup.pool else {}

    def state(self) -> dict[str, Any]:
        replay = {name: b.state() for name, b in self.buffers.items()}
        return {"order": self.order.state() | self._repeated(), "replay": replay}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises RunError when the task, what it repeats, or the seed is another one."""
        self.order = PromptOrder.restore(len(self.pool), self.setup.recipe.seed, saved["order"])
        if self._repeated() != {k: v for k, v in saved["order"].items() if k == "repeated"}:
            raise RunError("task.upsample is not the file that the checkpoint was written with; resume with that file, or "
                           "start a new run with another output=...")  # fmt: skip
        problems = {p.id: p for p in self.setup.train.problems} if self.buffers else {}
        self.buffers = {name: ReplayBuffer.restore(state, problems) for name, state in saved["replay"].items()}
