"""The wheel carries recipes and report assets, and works from any folder; generated docs are current."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The built wheel, unpacked outside the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_everything_that_is_not_code(unpacked):
    shipped = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "opdkit").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts}  # fmt: skip
    packed = {str(p.relative_to(unpacked)) for p in (unpacked / "opdkit").rglob("*") if p.is_file()}
    assert packed == shipped
    assert {"opdkit/recipes/cpu/demo.yaml", "opdkit/recipes/cpu/smollm2.yaml", "opdkit/report/template.html"} <= packed


def test_the_wheel_works_from_any_folder(unpacked, tmp_path):
    code = (
        "import opdkit, sys; from opdkit.config import load_recipe; from opdkit.report import write_report\n"
        "assert opdkit.__file__.startswith(sys.argv[1]), opdkit.__file__\n"
        "print(load_recipe('cpu/demo').method.name, load_recipe('cpu/smollm2').task.path)"
    )
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", code, str(unpacked)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    name, prompts = done.stdout.split()
    assert name == "full_opd" and Path(prompts).is_relative_to(unpacked) and Path(prompts).is_file()


def test_generated_docs_are_current():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_no_method_is_named_outside_its_folder():
    names = {p.stem for p in (ROOT / "src" / "opdkit" / "methods").glob("*.py")} - {"__init__"}
    allowed = {"grpo", "sft"}  # the testbed's builds are recipes, and recipes name methods
    for path in (ROOT / "src" / "opdkit").rglob("*.py"):
        if path.parent.name in ("methods", "testbed"):
            continue
        text = path.read_text()
        found = {name for name in names - allowed if f'"{name}"' in text or f"methods.{name}" in text}
        assert not found, f"{path} names {found}"
