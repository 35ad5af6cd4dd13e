"""Building testbed models: names, seeds, content hashes, and two real (very short) builds through the engine."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opdkit.errors import ModelError
from opdkit.testbed import build
from opdkit.testbed.build import BUILDS, Build, content_hash, find, resolve, supervised

SUMS = {"name": "sums", "settings": {"format": "a"}, "eval_size": 8}
SHORT = supervised(2) | {"train": {"steps": 2, "prompts_per_step": 4}}
SUMS_B = SUMS | {"settings": {"format": "b"}}


@pytest.fixture
def short_builds(monkeypatch):
    monkeypatch.setitem(BUILDS, "first", Build("for this test", "new:xs", SUMS, **SHORT))
    monkeypatch.setitem(BUILDS, "second", Build("for this test", "first", SUMS_B, **SHORT))


def test_names():
    with pytest.raises(ModelError, match="no testbed model 'studnet': did you mean 'student'"):
        find("studnet")
    with pytest.raises(ModelError, match="no testbed model 'student@x'"):
        find("student@x")
    assert find("student@3").seed == 3 and find("student@0") == find("student")
    assert find("rl@5").start == "mid@5"


def test_the_hash_follows_recipe_parent_and_seed(monkeypatch):
    hashes = {name: content_hash(find(name)) for name in (*BUILDS, "student@1", "rl@1")}
    assert len(set(hashes.values())) == len(hashes)
    monkeypatch.setitem(BUILDS, "mid", Build("changed", "new:m", SUMS, **supervised(3)))
    assert content_hash(find("rl")) != hashes["rl"] and content_hash(find("student")) == hashes["student"]


def test_a_build_is_complete_deterministic_and_taken_from_the_cache(short_builds, tmp_path, monkeypatch):
    first = resolve("second", tmp_path / "a")
    again = resolve("second", tmp_path / "b")
    assert first.name == again.name and first.name.startswith("second-")
    one, two = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    parent = load_file(resolve("first", tmp_path / "a") / "model.safetensors")
    assert any(not torch.equal(one[k], parent[k]) for k in one)
    assert {"config.json", "tokenizer.json", "evals.jsonl"} <= {p.name for p in first.iterdir()}
    assert not (first / "trainer").exists()
    assert [json.loads(line)["step"] for line in (first / "evals.jsonl").read_text().splitlines()] == [0, 2]
    folders = sorted(p.name for p in (tmp_path / "a" / "testbed").iterdir() if not p.name.endswith(".lock"))
    assert folders == sorted([first.name, resolve("first", tmp_path / "a").name])
    monkeypatch.setattr(build, "_build", lambda *a: pytest.fail("built although it is in the cache"))
    assert resolve("second", tmp_path / "a") == first


def test_every_build_has_a_valid_recipe():
    from opdkit.catalogue import build_method
    from opdkit.config import parse_recipe
    from opdkit.train.checks import check_recipe

    for name in BUILDS:
        recipe = parse_recipe(build._recipe(find(name), "student", "output"))
        check_recipe(recipe, build_method(recipe.method.name, recipe.method.arguments))
