"""What stopping responses early costs and saves: the same training steps with and without it, phase by phase.

    python benchmarks/early_stop.py [--quick] [--threads 1] [--rounds 6] [--steps 4] [--prompts 8] [--models FOLDER]

The student of the testbed's JSON lists learns by `prune_opd` (responses of up to 96 tokens, k 16, gamma 0.7, a reliability
that ten events use up) from a teacher that has never seen such lists, and from one that writes them. With `stop_every` n the
teacher reads along every n tokens (its passes count as sampling), and its states serve the scoring. The learning rate is so
small that all contenders see the same responses up to where they are stopped. Rounds alternate; of every step the fastest
round counts. About 4 minutes once the models are built. `--models` names a folder that holds lists-weak, base and lists.
Left out: what a stopped response would have taught (see docs/prune.md), accelerators.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Table

from opdkit.config import parse_recipe
from opdkit.train.loop import train

PHASES = ("sample", "score", "update", "step")
MANY, FEW = 0.01, 0.1  # what an event takes: 100 events do not happen in 96 tokens, 10 do
CONTENDERS = [  # teacher, drop, stop_every
    ("base", FEW, None), ("base", FEW, 4), ("base", FEW, 8), ("base", FEW, 16), ("base", FEW, 32),
    ("lists", FEW, None), ("lists", FEW, 8), ("lists", MANY, None), ("lists", MANY, 8),
]  # fmt: skip
NAMES = {"base": "never saw lists", "lists": "writes lists"}
QUICK = [("base", FEW, None), ("base", FEW, 8)]
Json = dict[str, Any]
Contender = tuple[str, float, int | None]


def steps_of(contender: Contender, args: argparse.Namespace, output: Path) -> list[Json]:
    """The metrics of every training step of one contender."""
    teacher, drop, every = contender
    method = {"name": "prune_opd", "drop": drop, "adapt": False}
    recipe = {
        "method": method | ({} if every is None else {"stop_every": every}),
        "student": {"path": f"{args.models}lists-weak"},
        "teachers": {"teacher": {"path": f"{args.models}{teacher}"}},
        "task": {"kind": "testbed", "name": "lists", "eval_size": 2},
        "sampling": {"group": 4, "max_new_tokens": 96},
        "optim": {"lr": 1e-9},
        "train": {"steps": args.steps + 1, "prompts_per_step": args.prompts},
        "eval": {"kl_prompts": 0, "teacher": False},
        "log": {"trackers": [], "rollouts_every": 10**6},
        "output": str(output),
    }
    lines = (train(parse_recipe(recipe)) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]  # the first step warms up


def fastest(rounds: list[list[Json]]) -> Json:
    """Seconds of every phase and tokens of the mean step; each step's time is that of its fastest round."""
    count = len(rounds[0])
    found = {p: sum(min(r[i][f"seconds/{p}"] for r in rounds) for i in range(count)) / count for p in PHASES}
    means = {key: sum(row[key] for row in rounds[0]) / count for key in ("tokens", "response_length", "drift")}
    return found | means | {"stopped": sum(row.get("count/stopped_early", 0.0) for row in rounds[0]) / count}


def table_of(found: dict[Contender, Json], args: argparse.Namespace) -> Table:
    """A row for each contender; the ratio is to the same teacher's step without reading along."""
    table = Table(
        f"One step of {args.prompts} prompts x 4 responses of at most 96 tokens, {args.threads} thread(s), seconds",
        ["teacher", "events that end it", "stop every", "events/token", "tokens", "stopped", *PHASES, "step / step without"],
        note="sample includes the teacher's reading along; score is then the vocabulary head alone",
    )  # fmt: skip
    for (teacher, drop, every), n in found.items():
        ratio = n["step"] / found[teacher, drop, None]["step"]
        stopped = None if every is None else n["stopped"]
        phases = [n[p] for p in PHASES]
        table.rows.append([NAMES[teacher], round(1 / drop), every, n["drift"], n["tokens"], stopped, *phases, ratio])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two contenders, one round of two steps; nothing is written"
    )
    for name, default in (("threads", 1), ("rounds", 6), ("steps", 4), ("prompts", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--models", default="testbed:")
    args = parser.parse_args()
    args.models = args.models if args.models == "testbed:" else args.models.rstrip("/") + "/"
    if args.quick:
        args.rounds, args.steps = 1, 2
    torch.set_num_threads(args.threads)
    runs: dict[Contender, list[list[Json]]] = {c: [] for c in (QUICK if args.quick else CONTENDERS)}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for place, contender in enumerate(runs):
                runs[contender].append(steps_of(contender, args, Path(folder) / f"{number}-{place}"))
    table = table_of({c: fastest(rounds) for c, rounds in runs.items()}, args)
    print(table.markdown())
    if args.quick:
        return
    keys = (*(f"seconds/{p}" for p in PHASES), "tokens")
    raw = {str(c): [[{k: row[k] for k in keys} for row in r] for r in rounds] for c, rounds in runs.items()}
    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("threads", "rounds", "steps", "prompts"))
    print(measure.write("early_stop", f"python benchmarks/early_stop.py {options}", [table], [], raw))


if __name__ == "__main__":
    main()
