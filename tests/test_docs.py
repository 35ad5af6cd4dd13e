"""The generated documentation: its facts are looked up and run, and a fact that is not true stops it."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from opdkit.catalogue import build_method, method_names
from opdkit.config import load_recipe, recipe_path
from opdkit.errors import RecipeError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import combinations  # noqa: E402
import features  # noqa: E402

import docs  # noqa: E402


@pytest.mark.parametrize(
    ("check", "true"),
    [
        ("method:gkd", True),
        ("method:gkdd", False),
        ("field:lora.rank", True),
        ("field:teachers.NAME.temperature", True),
        ("field:lora.rang", False),
        ("value:student.quantize:nf4", True),
        ("value:student.quantize:nf5", False),
        ("value:method.topk_kl.tail:raw", True),
        ("value:method.topk_kl.of:mine", False),
        ("import:opdkit.losses:Divergence", True),
        ("import:opdkit.losses:Divergences", False),
        ("import:opdkit.lossses:Divergence", False),
        ("test:tests/test_docs.py::test_a_check_is_true_or_not", True),
        ("test:tests/test_docs.py::test_a_check", False),
        ("test:tests/test_nothing.py::test_a_check", False),
        ("command:translate", True),
        ("command:serve", False),
        ("recipe:cpu/demo", True),
        ("recipe:cpu/nothing", False),
        ("file:LICENSE", True),
        ("file:LICENCE", False),
        ("extra:wandb", True),
        ("extra:vllm", False),
        ("no:vllm", True),
        ("no:torch", False),
    ],
)
def test_a_check_is_true_or_not(check, true):
    assert features.holds(check) is true


def test_a_claim_that_does_not_hold_stops_the_table(tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    row = "- {feature: Vision, trl: a, verl: b, ms-swift: c, opdkit: 'Yes', checks: ['method:vision']}"
    (tmp_path / "scripts" / "peers.yaml").write_text(row)
    monkeypatch.setattr(features, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="'Vision' claims 'Yes', but method:vision does not hold"):
        features.rows()


def test_every_row_of_features_is_complete():
    for row in features.rows():
        assert row.keys() - {"short", "brief"} == {"feature", *features.SYSTEMS, "checks"} and row["checks"], row
        assert not row.keys() & {"brief"} or row["short"]


def test_the_candidate_sets_differ():
    pair = combinations.Pair(torch.arange(12.0), torch.arange(12.0).roll(2))
    sets = [pair.ids(of).tolist() for of in combinations.SETS]
    assert sets == [[8, 9, 10, 11], [0, 1, 10, 11], [0, 1, 8, 9, 10, 11], [10, 11], [0, 1, 8, 9]]


def test_a_gradient_that_is_off_stops_the_table():
    exact = torch.zeros(4, dtype=torch.float64)
    combinations.same("cell", exact, exact + 1e-12)
    with pytest.raises(SystemExit, match=re.escape("cell: the gradient is 1.0e-03 away from the formula's")):
        combinations.same("cell", exact, exact + 1e-3)
    with pytest.raises(SystemExit, match="nan"):
        combinations.same("cell", exact, exact * float("nan"))


def test_the_table_of_combinations():
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in combinations.table().splitlines()]
    assert cells[0][1:] == list(combinations.COLUMNS) and len(cells) == 2 + 8 + 2
    by_name = {row[0]: row[1:] for row in cells[2:]}
    assert by_name["reverse KL"] == ["exact", "exact (k2)", "as released", "own", "own", "own", "exact"]
    assert by_name["JSD"] == ["·", "·", "·", "own", "own", "own", "exact"]


def test_only_what_stands_between_the_marks_is_replaced():
    text = "a\n<!-- x:begin (make docs) -->\nold\n<!-- x:end -->\nb\n"
    assert docs.between(text, "x", "new") == "a\n<!-- x:begin (make docs) -->\nnew\n<!-- x:end -->\nb\n"


def test_links_between_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"\bopd (train|plan|cliff|difficulty|eval|translate|explain|methods)\b([^`|#>\n]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_on_shipped_recipes_are_accepted(page):
    """Recipe, settings and method of every command that a page shows; `my.yaml` and the like are the reader's own."""
    for command, rest in COMMAND.findall(page.read_text()):
        try:
            words = shlex.split(rest)
        except ValueError:  # an apostrophe of prose
            continue
        assert command != "methods" or not words[:1] or words[0].upper() != words[0], (
            f"opd methods {words} takes nothing"
        )
        if command == "explain" and words and words[0].islower():
            assert words[0] in method_names()
        if command in ("explain", "methods") or not words or not re.fullmatch(r"(cpu|gpu|peers)/[\w-]+", words[0]):
            continue
        recipe_path(words[0])
        recipe = load_recipe(words[0], [word for word in words[1:] if "=" in word and not word.startswith("-")])
        if "cliff" not in recipe.method.arguments:  # a file that the command before it writes
            build_method(recipe.method.name, recipe.method.arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_blocks_of_code_are_code(page):
    for language, block in re.findall(r"```(python|yaml)\n(.*?)```", page.read_text(), re.DOTALL):
        if language == "python":
            compile(block, page.name, "exec")
        else:
            assert yaml.safe_load(block) is not None


def test_a_command_that_is_not_accepted_is_found():
    with pytest.raises(RecipeError, match=r"unknown key 'train\.stepz'"):
        load_recipe("cpu/sod", ["train.stepz=3"])
    assert COMMAND.findall("`opd train cpu/x a=1` and opd explain y | z") == [
        ("train", " cpu/x a=1"),
        ("explain", " y "),
    ]
