"""Loading models: what is refused and how, and that head(hidden) is the model's own logits in every architecture."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers.utils import ModelOutput

from opdkit.config import ModelConfig
from opdkit.errors import ModelError
from opdkit.models import LanguageModel, cache_folder, check_same_vocabulary, load_model, resolve_path
from opdkit.rollouts.cache import CACHE
from opdkit.rollouts.sampler import Sampling, sample

BASE = dict(
    vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
)  # fmt: skip
GPT2 = dict(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
GEMMA2 = dict(sliding_window=6, query_pre_attn_scalar=16, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
NEXT = dict(
    pad_token_id=None, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
    moe_intermediate_size=16, shared_expert_intermediate_size=16,
)  # fmt: skip
ARCHITECTURES = {
    "llama": BASE,
    "gpt2": GPT2,
    "mistral": BASE | {"sliding_window": 6},
    "gemma2": BASE | GEMMA2,
    "cohere": BASE | {"logit_scale": 0.25},
    "granite": BASE | {"logits_scaling": 8.0},
    "qwen3_next": BASE | NEXT,
}


def random_model(kind: str, attn: str = "sdpa", **settings) -> LanguageModel:
    """A tiny random model of an architecture, with a head sharp enough for greedy decoding to move."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    model.get_output_embeddings().weight.data *= 6
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return LanguageModel("student", kind, model, make_tokenizer())


@pytest.fixture(scope="module")
def saved(student_path, tmp_path_factory) -> Path:
    """A folder that a test may copy and damage."""
    return Path(student_path)


# ---------------------------------------------------------------------------------------------------------------------
# Architectures


@pytest.mark.filterwarnings("ignore")  # transformers on kernels that are not installed
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_head_and_sampler_agree_with_the_model(kind):
    lm = random_model(kind, "eager" if kind == "gemma2" else "sdpa", **ARCHITECTURES[kind])
    prompts = [[5, 9, 30], [7], [12, 3, 8, 20, 4, 11, 13, 14]]
    lm.check_head()
    ids = torch.tensor([prompts[2]])
    with torch.no_grad():
        own = lm.model(ids).logits[0, :, :44]
        ours = lm.head().logits(lm.hidden(ids)[0])
    assert (own - ours).abs().max() <= 1e-5
    for prompt, group in zip(prompts, sample(lm, prompts, Sampling(2, 12, 0.0), 0), strict=True):
        out = lm.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, suppress_tokens=range(44, 48)
        )
        assert [list(s.ids) for s in group] == [out[0, len(prompt) :].tolist()] * 2
    how = Sampling(3, 12, eos_ids=(1, 5, 10, 15, 20, 25))
    for prompt, group in zip(prompts, sample(lm, prompts, how, 0), strict=True):
        for s in group:  # past the sliding window, and after other rows have left
            with torch.no_grad():
                logits = lm.model(torch.tensor([[*prompt, *s.ids]])).logits[0, len(prompt) - 1 : -1, :44]
            truth = logits.log_softmax(-1).gather(1, torch.tensor(s.ids)[:, None]).squeeze(1)
            assert (s.capture.logp - truth).abs().max() <= 1e-5


def test_transformed_logits_are_found_out():
    lm = random_model("llama", **BASE)
    lm.check_head()
    handle = lm.model.register_forward_hook(lambda *a: setattr(a[-1], "logits", a[-1].logits * 1.1))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM\): its logits differ from head x hidden states by"):
        lm.check_head()
    handle.remove()
    lm.model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(ModelError, match="differ from head x hidden states by nan"):
        lm.check_head()


def test_a_model_that_does_not_use_the_cache_is_refused(monkeypatch):
    lm, real = random_model("gpt2", **GPT2), LanguageModel.run

    def run(self, **inputs):
        return {"last_hidden_state": real(self, **inputs).last_hidden_state}

    monkeypatch.setattr(LanguageModel, "run", lambda self, **inputs: ModelOutput(run(self, **inputs)))
    with pytest.raises(ModelError, match="GPT2LMHeadModel\\) does not use the transformers key-value cache"):
        sample(lm, [[3, 4]], Sampling(1, 8), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(CACHE == "past_key_values", reason="before 5.24 transformers kept the states of Mamba elsewhere")
def test_a_state_space_model_samples_what_its_own_pass_says():
    settings = dict(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8, n_groups=1
    )
    lm, prompts = random_model("mamba2", "eager", **settings), [[5, 6, 7], [4, 5, 6, 9]]
    for prompt, (got,) in zip(prompts, sample(lm, prompts, Sampling(1, 6, eos_ids=(43,)), 0), strict=True):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[*prompt, *got.ids]])).logits[0, len(prompt) - 1 : -1, : lm.vocab]
        expected = logits.log_softmax(-1)[range(len(got.ids)), list(got.ids)]
        torch.testing.assert_close(got.capture.logp, expected, rtol=0, atol=1e-5)


def test_head_rows_biases_and_temperature(student_path):
    lm = load_model(ModelConfig(path=student_path, temperature=2.0), "teacher")
    head = lm.head()
    assert (lm.vocab, head.size, head.weight.shape, head.temperature) == (44, 44, (48, 32), 2.0)
    assert head.weight.data_ptr() == lm.model.get_input_embeddings().weight.data_ptr()  # shared, never copied
    assert lm.context_length == 128
    layer = torch.nn.Linear(32, 48)
    lm.model.lm_head = layer
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lm.head().logits(hidden), layer(hidden)[:, :44] / 2, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def damaged(saved: Path, to: Path, remove=(), **config) -> str:
    shutil.copytree(saved, to)
    for name in remove:
        (to / name).unlink()
    settings = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(settings))
    return str(to)


@pytest.mark.parametrize(
    ("remove", "config", "message"),
    [
        (["model.safetensors"], {}, "cannot load student from .*no file named model.safetensors"),
        (["tokenizer.json", "tokenizer_config.json"], {}, r"student .* has no tokenizer; save the tokenizer"),
        (
            [],
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
            r"11 weights are absent .*model.layers.2",
        ),
        (
            [],
            {"intermediate_size": 32},
            r"6 weights are absent or of another shape, such as model.layers.0.mlp.down_proj",
        ),
        ([], {"vocab_size": 40}, "1 weights are absent or of another shape, such as model.embed_tokens.weight"),
        ([], {"model_type": "nonsense"}, "cannot load student from .*nonsense"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_folders_that_do_not_work(saved, tmp_path, remove, config, message):
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(path=damaged(saved, tmp_path / "model", remove, **config)), "student")


def test_a_truncated_file_of_weights(saved, tmp_path):
    path = damaged(saved, tmp_path / "model")
    weights = Path(path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ModelError, match=r"cannot load student from .*deserializing header"):
        load_model(ModelConfig(path=path), "student")


@pytest.mark.parametrize("path", ["/no/such/model", "~/no-such-model", "./model", "a/b/c"])
def test_a_folder_that_does_not_exist(path):
    with pytest.raises(ModelError, match=f"cannot load teacher from '{path}': no such folder. Give a folder made by"):
        load_model(ModelConfig(path=path), "teacher")


@pytest.mark.parametrize("path", ["no-such-model", "nobody/no-such-model"])
def test_a_hub_id_that_cannot_be_reached(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=f"cannot load teacher from '{path}' with attn 'sdpa': .* Give a folder made by"
    ):
        load_model(ModelConfig(path=path), "teacher")


@pytest.mark.parametrize("attn", ["nonsense", "flash_attention_2"])
def test_an_attention_that_is_not_there(student_path, attn):
    with pytest.raises(ModelError, match=f"cannot load student from '{student_path}' with attn '{attn}'"):
        load_model(ModelConfig(path=student_path, attn=attn), "student")


def test_an_attention_that_does_not_suit_the_model(tmp_path):
    lm = random_model("gemma2", "eager", **(BASE | GEMMA2))
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="with attn 'sdpa': Gemma2ForCausalLM does not support"):
        load_model(ModelConfig(path=str(tmp_path)), "student")
    assert load_model(ModelConfig(path=str(tmp_path), attn="eager"), "student").head().softcap == 3.0


def test_a_tokenizer_larger_than_the_head(tmp_path):
    path = make_model(tmp_path / "model", 1, rows=40)
    with pytest.raises(ModelError, match="the tokenizer has 44 ids but the model only 40 rows; use the tokenizer that"):
        load_model(ModelConfig(path=path), "student")


def test_a_model_without_eos(student_path):
    lm = load_model(ModelConfig(path=student_path), "student")
    assert lm.eos_ids == (1,)
    lm.model.generation_config.eos_token_id = [3, 5]
    assert lm.eos_ids == (3, 5)
    lm.model.generation_config.eos_token_id = None
    assert lm.eos_ids == (1,)  # the tokenizer's
    lm.tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"student \(.*\) names no EOS token; set sampling.eos_ids"):
        sample(lm, [[3]], Sampling(), 0)
    assert len(sample(lm, [[3]], Sampling(max_new_tokens=3, eos_ids=(2,)), 0)[0]) == 1


def test_different_vocabularies_name_the_first_difference(student_path, tmp_path):
    from conftest import LETTERS

    student = load_model(ModelConfig(path=student_path), "student")
    same = load_model(ModelConfig(path=make_model(tmp_path / "same", 5)), "teacher")
    check_same_vocabulary(student, same)
    swapped = make_tokenizer(LETTERS.replace("cd", "dc"))
    other = load_model(ModelConfig(path=make_model(tmp_path / "swap", 5, tokenizer=swapped)), "big")
    with pytest.raises(ModelError, match=r"teacher 'big' .*4 entries differ, the first is id 4 'c'"):
        check_same_vocabulary(student, other)
    longer = load_model(
        ModelConfig(path=make_model(tmp_path / "long", 5, tokenizer=make_tokenizer(LETTERS + "!"))), "big"
    )
    with pytest.raises(ModelError, match=r"44 tokens.*45 tokens.*1 entries differ, the first is id 44 '!'"):
        check_same_vocabulary(student, longer)


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def test_paths_are_dispatched_by_scheme(monkeypatch, tmp_path):
    import opdkit.testbed.build
    import opdkit.testbed.smollm2

    monkeypatch.setenv("OPDKIT_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/someone")
    seen = []
    monkeypatch.setattr(
        opdkit.testbed.build, "resolve", lambda name, cache: seen.append((name, cache)) or tmp_path / "a"
    )
    monkeypatch.setattr(
        opdkit.testbed.smollm2, "resolve", lambda name, cache: seen.append((name, cache)) or tmp_path / "b"
    )
    assert resolve_path("testbed:student") == str(tmp_path / "a")
    assert resolve_path("smollm2:full") == str(tmp_path / "b")
    assert seen == [("student", tmp_path), ("full", tmp_path)]
    assert [resolve_path(p) for p in ("org/name", "C:/models", "~/x")] == ["org/name", "C:/models", "/home/someone/x"]
    assert len(seen) == 2


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("OPDKIT_CACHE", "/c/own")
    assert cache_folder() == Path("/c/own")
    monkeypatch.delenv("OPDKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c/xdg")
    assert cache_folder() == Path("/c/xdg/opdkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/opdkit")
