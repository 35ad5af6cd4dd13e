"""The testbed's tokenizer, tasks and model shapes."""

import itertools
from random import Random

import pytest
import torch

from opdkit.config import TaskConfig
from opdkit.errors import DataError, ModelError, RecipeError
from opdkit.tasks.load import load_task
from opdkit.tasks.problem import Problem, Task
from opdkit.tasks.prompts import encode_prompt
from opdkit.testbed import grammar
from opdkit.testbed.shapes import SHAPES, new_model
from opdkit.testbed.tasks import part_of, testbed_task
from opdkit.testbed.tokenizer import EOS, EOS_ID, PAD_ID, UNK_ID, VOCABULARY, WORDS, testbed_tokenizer

make_task, make_tokenizer = testbed_task, testbed_tokenizer
del testbed_task, testbed_tokenizer  # pytest would collect them: their names begin with "test"

TOKENIZER = make_tokenizer()
ASCII = "".join(map(chr, range(32, 127))) + "\n"


def task(name: str, **fields: object) -> Task:
    return make_task(TaskConfig.model_validate({"kind": "testbed", "name": name, "eval_size": 40, **fields}))


def sum_problem(prompt: str, layout: str) -> Problem:
    answer = grammar.parse(prompt).answer
    return Problem(id="x", prompt=prompt, answer=answer, domain="sums", metadata={"format": layout})


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


# The tokenizer


def test_every_ascii_character_is_one_token_and_comes_back():
    assert len(TOKENIZER) == len(VOCABULARY) == 107
    for character in ASCII:
        assert len(encode(character)) == 1
    assert TOKENIZER.decode(encode(ASCII), skip_special_tokens=True) == ASCII


@pytest.mark.parametrize(
    "text",
    ["", "  a  b ", "Spell this wordy backward (example: sun", "don 't , do n't .", " \n\n x\n", "<eos><pad>", "12 3"],
)
def test_texts_come_back_exactly(text: str):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text


def test_random_texts_come_back_exactly():
    random = Random(0)
    for _ in range(200):
        text = "".join(random.choice([*ASCII, *WORDS, "nus", ":"]) for _ in range(random.randint(0, 30)))
        assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text


def test_the_gym_prompt_is_nine_tokens_and_its_word():
    pieces = TOKENIZER.convert_ids_to_tokens(encode("Spell this word backward (example: sun -> nus): cab"))
    assert pieces == [*WORDS, " ", "c", "a", "b"]


def test_digits_are_single_tokens():
    assert TOKENIZER.convert_ids_to_tokens(encode("47+85-36=")) == list("47+85-36=")


def test_special_tokens_vanish_when_decoding_and_no_ascii_text_spells_them():
    ids = [PAD_ID, *encode("96"), EOS_ID]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "96"
    assert TOKENIZER.decode(ids, skip_special_tokens=False).endswith(EOS)
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id) == (PAD_ID, EOS_ID, UNK_ID)
    assert not set(encode("<pad><eos><unk>")) & {PAD_ID, EOS_ID, UNK_ID}
    assert encode("é") == [UNK_ID]


def test_chat_and_plain_prompts_have_the_same_tokens():
    for problem in [task("sums").eval[0], task("gym").eval[0]]:
        chat = encode_prompt(TOKENIZER, problem, "chat", None)
        assert chat == encode_prompt(TOKENIZER, problem, "plain", None) == tuple(encode(str(problem.prompt)))


def test_the_chat_template_writes_a_dialogue():
    messages = [("system", "Add."), ("user", "4+5="), ("assistant", "9"), ("user", "1+1=")]
    text = TOKENIZER.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )
    assert text == f"Add.\n4+5=9{EOS}1+1="
    assert encode(text).index(EOS_ID) == len("Add.\n4+5=9")


def test_the_saved_tokenizer_is_the_same(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"Spell this  {ASCII}{EOS}"
    assert loaded(text)["input_ids"] == encode(text)
    assert loaded.decode(encode(text), skip_special_tokens=True) == text.removesuffix(EOS)
    assert loaded.chat_template == TOKENIZER.chat_template


# The formats


@pytest.mark.parametrize(
    ("prompt", "a", "b"),
    [
        ("47+85-36=", "1213 -609=96", "u12-6t1309=96"),  # 7+5=12, 4+8+1=13; 2-6 borrows, 13-3-1=9
        ("99+99+99=", "1819 1729=297", "u1817t1929=297"),  # 18, 19; 8+9=17, 19+9+1=29
        ("50-50+10=", "0000 0001=10", "u0000t0001=10"),
        ("20-19-1=", "-100 0000=0", "u-100t0000=0"),  # 0-9 borrows and leaves 1, 2-1-1=0; 1-1=0
        ("9+8=", "17=17", "u17=17"),
        ("12+34+56-78=", "0604 1210 -402=24", "u0612-4t041002=24"),  # 46, 102, 24
        ("123+989-113=", "121111 -9-909=999", "u12-9t11-9h1109=999"),  # 3+9=12, 2+8+1=11, 1+9+1=11; ...
    ],
)
def test_both_formats_by_hand(prompt: str, a: str, b: str):
    chain = grammar.parse(prompt)
    assert chain.prompt == prompt
    assert grammar.solution(chain, "a") == a
    assert grammar.solution(chain, "b") == b


@pytest.mark.parametrize(("terms", "digits"), itertools.product([2, 3, 6], [1, 2, 3]))
def test_drawn_sums_have_the_asked_shape_and_the_answer_of_python(terms: int, digits: int):
    random = Random(7)
    for _ in range(50):
        chain = grammar.draw(random, terms, digits)
        assert len(chain.terms) == terms and {len(str(abs(term))) for term in chain.terms} == {digits}
        assert min(itertools.accumulate(chain.terms)) >= 0 and grammar.parse(chain.prompt) == chain
        for layout in grammar.FORMATS:
            work, answer = grammar.solution(chain, layout).split("=")
            assert int(answer) == sum(chain.terms)
            assert len(work) == 2 * digits * (terms - 1) + {"a": terms - 2, "b": digits}[layout]


def test_a_quarter_of_two_term_sums_are_differences():
    """The sign is minus at even odds where the second term is not the larger one, which is every other time."""
    problems = task("sums", settings={"terms": 2}).train[:400]
    assert 70 < sum("-" in str(problem.prompt) for problem in problems) < 130


# The tasks


@pytest.mark.parametrize("name", ["sums", "gym", "mix"])
def test_targets_are_correct_and_damaged_ones_are_not(name: str):
    made = task(name, settings={"format": "mix"} if name == "sums" else {})
    for problem in [*made.eval, *made.train[:40]]:
        response = made.target(problem)
        assert made.verify(problem, response).correct and made.verify(problem, response).reward == 1.0
        assert made.verify(problem, f" {response}\n").correct
        for wrong in [response[:-1], response + "0", "", response[:-1] + "?"]:
            verdict = made.verify(problem, wrong)
            assert not verdict.correct and 0.0 <= verdict.reward < 1.0


@pytest.mark.parametrize("response", ["1213 -609=96", "u12-6t1309=96", "anything=0=96", "= 96 ", "96"])
def test_only_the_final_answer_of_a_sum_counts(response: str):
    assert task("sums").verify(sum_problem("47+85-36=", "a"), response).correct


@pytest.mark.parametrize("response", ["96=95", "1213 -609=", "1213 -609", "=096", "=9 6", "=96.", "=+96"])
def test_other_final_answers_of_a_sum_are_wrong(response: str):
    assert task("sums").verify(sum_problem("47+85-36=", "a"), response).reward == 0.0


def test_the_gym_reward_is_that_of_reasoning_gym():
    problem = Problem(id="x", prompt="Spell this word backward (example: sun -> nus): cab", answer="bac", domain="gym")
    verify = task("gym").verify
    assert verify(problem, "bac").reward == 1.0
    assert verify(problem, "bax").reward == pytest.approx(2 / 3)
    assert verify(problem, "bacb").reward == pytest.approx(0.8)  # right letters and one too many


def test_a_longer_gym_answer_is_never_correct():
    word = "abcdef"  # reasoning-gym adds up six times 1/6, which is not quite one, and so misses its own deduction
    problem = Problem(id="x", prompt=word, answer=word[::-1], domain="gym")
    assert not task("gym", settings={"max_word_len": 6}).verify(problem, word[::-1] + "x").correct


@pytest.mark.parametrize("name", ["sums", "gym", "mix"])
def test_no_evaluation_prompt_is_in_training_whatever_the_seed(name: str):
    train = {str(problem.prompt) for seed in (0, 1) for problem in task(name, seed=seed).train[:500]}
    held = [str(problem.prompt) for seed in (0, 1, 2) for problem in task(name, seed=seed).eval]
    assert not train & set(held)
    assert {part_of(prompt) for prompt in held} == {"eval"} and {part_of(prompt) for prompt in train} == {"train"}
    assert len(set(held[:40])) == 40


@pytest.mark.parametrize("name", ["sums", "gym", "mix"])
def test_a_seed_always_gives_the_same_problems(name: str):
    first, again, other = task(name, seed=3), task(name, seed=3, train_size=700), task(name, seed=4)
    assert first.eval == again.eval and first.eval != other.eval
    assert first.train[600] == again.train[600] == again.train[-100] == again.train[550:650][50]
    assert [p.prompt for p in first.train[:20]] != [p.prompt for p in other.train[:20]]
    assert len(first.train) == 10_000 and len(again.train) == 700
    with pytest.raises(IndexError):
        again.train[700]


def test_a_seed_gives_the_same_sums_in_every_format():
    prompts = {
        layout: [problem.prompt for problem in task("sums", settings={"format": layout}).train[:30]]
        for layout in ("a", "b", "mix")
    }
    assert prompts["a"] == prompts["b"] == prompts["mix"]
    made = task("sums", settings={"format": "mix"})
    assert {made.target(problem)[0] == "u" for problem in made.train[:30]} == {True, False}


def test_the_mix_holds_both_domains_in_the_asked_share():
    problems = task("mix", settings={"gym_share": 0.25}).train[:400]
    share = sum(problem.domain == "gym" for problem in problems) / 400
    assert {problem.domain for problem in problems} == {"sums", "gym"} and 0.18 < share < 0.32
    assert {problem.metadata["format"] for problem in problems if problem.domain == "sums"} == {"a", "b"}


def test_known_problems_do_not_change():
    """Caches and reported numbers depend on the draw."""
    assert [problem.prompt for problem in task("sums").eval[:3]] == ["65+93+92=", "12+84+17=", "69-69+62="]


def test_the_recipe_reaches_the_task():
    config = TaskConfig.model_validate({"kind": "testbed", "name": "sums", "eval_size": 5, "settings": {"terms": 2}})
    assert load_task(config).eval == make_task(config).eval


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sumz", {}, "the testbed has no task 'sumz': did you mean 'sums'"),
        ("sums", {"term": 3}, "'sums' has no setting 'term': did you mean 'terms'"),
        ("sums", {"max_word_len": 3}, "'sums' has no setting 'max_word_len'; known: digits, format, terms"),
        ("sums", {"format": "c"}, "task.settings.format = 'c'"),
        ("sums", {"digits": 4}, "task.settings.digits = 4: .* less than or equal to 3"),
        ("gym", {"min_word_len": 6}, "max_word_len 5 is below min_word_len 6"),
        ("mix", {"gym_share": 1.0}, "task.settings.gym_share = 1.0"),
    ],
)
def test_wrong_settings_name_the_right_ones(name: str, settings: dict[str, object], message: str):
    with pytest.raises(RecipeError, match=message):
        task(name, settings=settings)


def test_a_task_with_too_few_prompts_says_so():
    with pytest.raises(DataError, match=r"'sums' has only about 1?\d different evaluation prompts .* asks for 40"):
        task("sums", settings={"terms": 2, "digits": 1})


# The shapes


def test_parameter_counts():
    counts = {name: sum(p.numel() for p in new_model(name, 0).parameters()) for name in SHAPES}
    # embedding + layers x (4 attention matrices + 3 MLP matrices + 2 norms + 2 head norms) + final norm
    assert counts["xs"] == 107 * 96 + 2 * (4 * 96**2 + 3 * 96 * 256 + 2 * 96 + 2 * 32) + 96 == 232_064
    assert counts["s"] == 342_912
    assert counts["m"] == 107 * 128 + 3 * (4 * 128**2 + 3 * 128 * 320 + 2 * 128 + 2 * 32) + 128 == 580_032
    assert counts["l"] == 1_165_696


def test_new_models_are_deterministic_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (new_model("xs", seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert {weight.dtype for weight in first.values()} == {torch.float32}


def test_a_new_model_knows_the_tokenizer():
    model = new_model("xs", 0)
    assert model.config.vocab_size == len(TOKENIZER)
    assert model.generation_config.eos_token_id == EOS_ID and model.generation_config.pad_token_id == PAD_ID
    ids = torch.tensor([encode("47+85-36=")])
    assert model(input_ids=ids).logits.shape == (1, 9, 107)


def test_an_unknown_shape_names_the_nearest():
    with pytest.raises(ModelError, match="no shape 'xl'"):
        new_model("xl", 0)
