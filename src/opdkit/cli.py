"""The `opd` command: parses the command line, prints results and turns opdkit's errors into one line and an exit code.

Left out on purpose: flags for settings (an override `section.key=value` reaches every field of a recipe) and any work:
each command imports what it calls when it runs, because `opd --help` must not wait for torch.
"""

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from opdkit import __version__
from opdkit.errors import NonFiniteError, OpdkitError, RecipeError, RunError

OVERRIDES_HELP = "Settings that replace the recipe's, for example train.steps=50."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="A.B=C", help=OVERRIDES_HELP)]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe such as cpu/demo.")
]
RecipeOrRun = Annotated[
    str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe (file or shipped name) or a run folder.")
]
MethodName = Annotated[str, typer.Argument(metavar="METHOD", help="A name that `opd methods` lists.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run folder.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved plan with its steps and memory, without any weights.")
]
PLANNED_GPU = "H100-80GB"
Gpu = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help=f"GPU that --dry-run plans for; {PLANNED_GPU} without it.")
]
PlanGpu = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Plan for this GPU, not for this machine.")]
Response = Annotated[
    float | None,
    typer.Option("--response", metavar="M", help="Mean response length assumed (tokens); the limit without."),
]
Gpus = Annotated[
    int | None, typer.Option("--gpus", metavar="N", help="Number of GPUs; 8 for a recipe with sharding, else 1.")
]


class Group(TyperGroup):
    """The command group: an opdkit error becomes one line on stderr and an exit code, any other error is our bug.

    Exit codes: 1 for a run that failed (RunError, NonFiniteError), 2 for wrong input, 130 for Ctrl-C.
    """

    # ctx is Any here and below: its class is click's or typer's own copy, depending on typer's version.
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OpdkitError as error:
            message = " ".join(str(error).split())
            typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1 if isinstance(error, RunError | NonFiniteError) else 2) from None


class RecipeCommand(TyperCommand):
    """A command whose help ends with the table of all recipe fields."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from opdkit.fields import print_fields

        print_fields()


app = typer.Typer(
    cls=Group,
    help="On-policy distillation of language models.",
    epilog="Start with: opd demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a plain traceback is what a bug report needs
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"opdkit {__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """On-policy distillation of language models."""
    # Read when torch starts its threads. Threads that spin while they wait halve the time of a small model's step, but
    # where several processes share the cores they take the others' time. A value that the user has set stays.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
        _print_translations()


class _Stderr(logging.Handler):
    """Prints each record as a line on whatever stderr is when it comes."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(record.getMessage(), err=True)


def _print_translations() -> None:
    """Let what other systems' names in a recipe became appear on stderr."""
    log = logging.getLogger("opdkit.recipe")
    log.setLevel(logging.INFO)
    log.handlers = [_Stderr()]


@app.command("demo")
def demo_command(
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(help="Run folder.")] = "runs/demo",
    seed: Annotated[int, typer.Option(min=0, help="Seed of data order and sampling.")] = 0,
) -> None:
    """Build a small teacher and student, distil, and write a report."""
    from opdkit.demo import demo

    typer.echo(demo(output, seed, overrides or []))


@app.command("train", cls=RecipeCommand)
def train_command(
    recipe: RecipeName, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False,
    gpu: Gpu = None, gpus: Gpus = None,
) -> None:  # fmt: skip
    """Train a student as a recipe says."""
    from opdkit.config import load_recipe

    if resume and dry_run:
        raise RecipeError("--resume has no effect together with --dry-run: give one of them")
    if (gpu is not None or gpus is not None) and not dry_run:
        raise RecipeError("--gpu and --gpus have no effect without --dry-run: they say what the plan is for")
    loaded = load_recipe(recipe, overrides or [])  # a wrong recipe fails before torch is imported
    if dry_run:
        from opdkit.plan import dry_run as plan

        typer.echo(plan(loaded, gpu or PLANNED_GPU, gpus))
        return
    from opdkit.train.loop import train

    run = train(loaded, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"run folder: {run}\nfor a report: opd report {run}")


@app.command("plan", cls=RecipeCommand)
def plan_command(
    recipe: RecipeName, overrides: Overrides = None, gpu: PlanGpu = None, gpus: Gpus = None, response: Response = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:  # fmt: skip
    """Estimate memory and time of a run's phases before it."""
    from opdkit.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from opdkit import plan

    found = plan.plan(loaded, gpu, gpus, response)
    typer.echo(plan.as_json(found) if as_json else plan.as_text(found))


@app.command("cliff")
def cliff_command(
    recipe: RecipeName, overrides: Overrides = None,
    tau: Annotated[float, typer.Option(help="Structural = the teacher's top probability is at least this.")] = 0.9,
    cap: Annotated[float | None, typer.Option(metavar="C", help="The cap of lambda*; the method's own without it.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 200,
    on: Annotated[Literal["teacher", "student"], typer.Option(help="Whose greedy responses are measured.")] = "teacher",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, which a method can take its lam from.")] = False,
) -> None:  # fmt: skip
    """Measure how far past its teacher a recipe may extrapolate."""
    from opdkit.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from opdkit.cliff_command import cliff

    typer.echo(cliff(loaded, tau=tau, cap=cap, prompts=prompts, on=on, as_json=as_json))


@app.command("eval")
def eval_command(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Evaluate a recipe's models, or a run's student, on held-out problems."""
    from opdkit.train.evaluate import evaluate_run

    typer.echo(evaluate_run(target, overrides or []))


@app.command("difficulty")
def difficulty_command(
    recipe: RecipeName, overrides: Overrides = None,
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="A new .jsonl file.")] = "difficulty.jsonl",
    samples: Annotated[int, typer.Option(min=2, help="Responses to each prompt.")] = 8,
    prompts: Annotated[int | None, typer.Option(min=1, help="Only the first so many training prompts.")] = None,
) -> None:  # fmt: skip
    """Measure how often the student solves each training prompt, for task.upsample."""
    from opdkit.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from opdkit.difficulty_command import difficulty

    typer.echo(difficulty(loaded, out, samples=samples, prompts=prompts))


@app.command("translate")
def translate_command(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe in other systems' names as one in ours."""
    import yaml

    from opdkit.config import parse_recipe, recipe_data

    data = recipe_data(recipe, overrides or [])
    parse_recipe(data)
    typer.echo(yaml.safe_dump(data, sort_keys=False), nl=False)


@app.command("methods")
def methods_command() -> None:
    """List the methods, one line each."""
    from rich.table import Table

    from opdkit.catalogue import method_table
    from opdkit.fields import console, plain

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("method", style="bold cyan", overflow="fold")
    table.add_column("idea", overflow="fold", ratio=1)
    table.add_column("paper", overflow="fold")
    for name, idea, paper in method_table():
        table.add_row(*(plain(cell) for cell in (name, idea, paper)))
    console().print(table)
    typer.echo("\nopd explain METHOD prints its equation, arguments and composition.")


@app.command("explain")
def explain_command(method: MethodName) -> None:
    """Print a method's idea, equation, arguments and composition."""
    from opdkit.catalogue import explain

    typer.echo(explain(method))


@app.command("report")
def report_command(run: RunFolder) -> None:
    """Write a run's report.html, also for a run that is not finished."""
    from opdkit.report import write_report

    typer.echo(str(write_report(Path(run))))


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .jsonl or .parquet file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl or .parquet file that does not exist.")],
    read_as: Annotated[str, typer.Option("--format", help="Layout of IN, as task.format names it.")] = "columns",
    write_as: Annotated[str, typer.Option("--to", help="Layout of OUT: columns or verl.")] = "columns",
) -> None:
    """Turn a data file of a known layout into our columns, or into verl's."""
    from opdkit.tasks.convert import convert

    typer.echo(convert(source, target, read_as, write_as))


@app.command("export")
def export_command(
    run: RunFolder,
    step: Annotated[int | None, typer.Option(min=0, help="Export this checkpoint instead of the last one.")] = None,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder; RUN/export without it.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA adapters into their base model.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Precision of the stored weights, such as bfloat16.")] = None,
) -> None:
    """Write a run's student as a model folder with tokenizer, generation config and model card."""
    from opdkit.train.export import export

    typer.echo(str(export(Path(run), step=step, to=to, merge=merge, dtype=dtype)))


if __name__ == "__main__":
    app()
