"""The command line: the list of commands, the help, what each command calls, and what a user's mistake looks like."""

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import opdkit
from opdkit.cli import app
from opdkit.config import Recipe, parse_recipe
from opdkit.errors import DataError, MethodError, ModelError, NonFiniteError, OpdkitError, RecipeError, RunError
from opdkit.fields import fields

RECIPE = """
method: {name: opd}
student: {path: student}
teachers: {teacher: {path: teacher}}
task: {kind: testbed, name: sums}
"""
ROOT = Path(__file__).parent.parent


def run(*arguments: str, width: int = 80) -> Any:
    """Run the command on a terminal of this width without colours, whatever the surrounding environment forces."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1", "FORCE_COLOR": None, "GITHUB_ACTIONS": None}
    return CliRunner().invoke(app, list(arguments), env=environment)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def fake(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """Put a module with these functions where a command imports it from."""
    stand_in = ModuleType(module)
    for name, function in functions.items():
        setattr(stand_in, name, function)
    monkeypatch.setitem(sys.modules, module, stand_in)


def test_the_list_of_commands() -> None:
    shown = run("--help").stdout
    commands = "demo train plan cliff eval difficulty translate methods explain convert export report"
    assert sorted(re.findall(r"^│ ([a-z]+)  ", shown, re.MULTILINE)) == sorted(commands.split())
    assert run("-h").stdout == shown
    (entry,) = entry_points(group="console_scripts", name="opd")
    assert entry.value == "opdkit.cli:app"


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "opdkit.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported and "demo" in done.stdout
    assert not imported & {"torch", "transformers", "datasets", "numpy", "pydantic", "yaml", "plotly", "reasoning_gym"}


@pytest.mark.parametrize("width", [80, 50, 200])
def test_train_help_lists_every_field_and_cuts_nothing(width: int) -> None:
    shown = run("train", "--help", width=width).stdout
    words = " ".join(shown.split())
    assert "…" not in shown and max(len(line) for line in shown.splitlines()) <= width
    for name, _, default, meaning in fields():
        assert re.search(rf"^{re.escape(name)} ", shown, re.MULTILINE), name
        if width == 200:
            assert re.sub(r"\bNone\b", "null", meaning) in words, name
        assert default == "required" or "default" in words
    if width == 200:
        assert "train.precision fp32 | bf16 | fp16, default fp32 arithmetic of forward passes (accelerate)" in words
        assert "sampling.eos_ids list[int] | null, default null token ids" in words
        assert "task.train_size int | null, default null training problems; null = all rows" in words
        assert "optim.betas tuple[float, float], default [0.9, 0.999] AdamW" in words
        assert "task.kind testbed | reasoning_gym | file | dataset | verifiers, required where prompts" in words


def test_version() -> None:
    assert run("--version").stdout == f"opdkit {opdkit.__version__}\n"


def test_train_gives_the_validated_recipe_to_the_loop(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Recipe, bool]] = []

    def train(loaded: Recipe, *, resume: bool = False) -> Path:
        seen.append((loaded, resume))
        return Path("runs/x")

    fake(monkeypatch, "opdkit.train.loop", train=train)
    fake(monkeypatch, "opdkit.plan", dry_run=lambda loaded, gpu, gpus: f"{loaded.train.steps} steps on {gpus} {gpu}")
    done = run("train", recipe, "train.steps=7", "--resume", "optim.lr=1e-3")
    assert (done.exit_code, done.stdout) == (0, "run folder: runs/x\nfor a report: opd report runs/x\n")
    ((loaded, resume),) = seen
    assert (loaded.train.steps, loaded.optim.lr, loaded.task.name, resume) == (7, 0.001, "sums", True)
    planned = run("train", recipe, "--dry-run", "train.steps=9")
    assert (planned.exit_code, planned.stdout, len(seen)) == (0, "9 steps on None H100-80GB\n", 1)
    planned = run("train", recipe, "--dry-run", "train.steps=9", "--gpu", "L40S-48GB", "--gpus", "4")
    assert planned.stdout == "9 steps on 4 L40S-48GB\n"
    refused = run("train", recipe, "--gpus", "4")
    assert refused.exit_code == 2 and "--gpu and --gpus have no effect without --dry-run" in refused.stderr


def test_demo_eval_explain_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "opdkit.demo", demo=lambda output, seed, overrides: f"{output} {seed} {overrides}")
    assert run("demo").stdout == "runs/demo 0 []\n"
    assert run("demo", "--output", "runs/y", "train.steps=3", "--seed", "2").stdout == "runs/y 2 ['train.steps=3']\n"
    fake(monkeypatch, "opdkit.train.evaluate", evaluate_run=lambda target, overrides: f"{target} {overrides}")
    assert run("eval", "runs/x", "eval.samples=4").stdout == "runs/x ['eval.samples=4']\n"
    fake(monkeypatch, "opdkit.catalogue", explain=lambda name: f"{name}: sum [N, K] of p log p/q")
    assert run("explain", "opd").stdout == "opd: sum [N, K] of p log p/q\n"
    fake(monkeypatch, "opdkit.report", write_report=lambda run: run / "report.html")
    assert run("report", str(tmp_path)).stdout == f"{tmp_path}/report.html\n"


def test_methods_wraps_long_lines_and_keeps_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    idea = (
        "policy gradient on the sampled token's log ratio, clipped to [-5, 5], with a [bold] claim that is rather long"
    )
    fake(monkeypatch, "opdkit.catalogue", method_table=lambda: [("opd", idea, "arXiv:1234.56789"), ("gkd", "b", "c")])
    shown = run("methods").stdout
    assert max(len(line) for line in shown.splitlines()) <= 80 and "…" not in shown
    column = shown.splitlines()[0].index("idea"), shown.splitlines()[0].index("paper")
    rows = shown.splitlines()[1:]
    wrapped = [
        row[slice(*column)].strip() for row in rows[: next(i for i, row in enumerate(rows) if row.startswith("gkd"))]
    ]
    assert " ".join(wrapped) == idea
    assert rows[0].startswith("opd ") and rows[0].rstrip().endswith("arXiv:1234.56789")


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError, 2), (MethodError, 2), (DataError, 2), (ModelError, 2), (RunError, 1), (NonFiniteError, 1)],
)
def test_an_opdkit_error_is_one_line(error: type[OpdkitError], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(name: str) -> str:
        raise error(f"no method '{name}':\n  did you mean [opd]? {'long ' * 40}end")

    fake(monkeypatch, "opdkit.catalogue", explain=explain)
    done = run("explain", "odp")
    assert done.exit_code == code
    assert done.stderr == f"error: no method 'odp': did you mean [opd]? {'long ' * 40}end\n"
    assert done.stdout == ""


def test_a_wrong_recipe_fails_before_anything_heavy_is_imported(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opdkit.train.loop", None)  # importing it would be an ImportError
    done = run("train", recipe, "train.stepz=3")
    assert (done.exit_code, done.stderr) == (2, "error: unknown key 'train.stepz': did you mean 'steps'?\n")
    done = run("train", "no/such.yaml")
    assert done.exit_code == 2 and done.stderr.startswith("error: no recipe file 'no/such.yaml'; give a path")
    done = run("train", recipe, "--resume", "--dry-run")
    assert done.exit_code == 2 and "--resume has no effect together with --dry-run" in done.stderr


def test_ctrl_c_exits_130_and_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> str:
        raise KeyboardInterrupt

    def broken(name: str) -> str:
        raise ZeroDivisionError("our bug")

    fake(monkeypatch, "opdkit.catalogue", explain=interrupted)
    assert run("explain", "opd").exit_code == 130
    fake(monkeypatch, "opdkit.catalogue", explain=broken)
    assert isinstance(run("explain", "opd").exception, ZeroDivisionError)


def test_a_misspelt_command_or_a_missing_argument_is_a_usage_error() -> None:
    done = run("trian")
    assert done.exit_code == 2 and "train" in done.stderr
    assert run("explain").exit_code == 2
    assert run("demo", "--seed", "-1").exit_code == 2


def test_the_recipe_of_the_docs_is_valid_and_every_command_is_documented() -> None:
    import yaml

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(blocks[0]))
    assert (recipe.method.name, list(recipe.teachers)) == ("opd", ["teacher"])
    text = (ROOT / "docs/cli.md").read_text()
    shown = re.findall(r"^│ ([a-z]+)  ", run("--help").stdout, re.MULTILINE)
    assert sorted(re.findall(r"^## `opd (\w+)", text, re.MULTILINE)) == sorted(shown)
