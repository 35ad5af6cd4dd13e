"""Responses sampled piece by piece: cut into pieces they are the ones sampled in one go; text may come in between."""

from dataclasses import replace

import pytest
import torch

from opdkit.config import ModelConfig
from opdkit.errors import DataError
from opdkit.models import LanguageModel, load_model
from opdkit.rollouts.flatten import flatten
from opdkit.rollouts.sampler import Keep, Mixture, Place, Sampling, noise, prompt_keys, sample
from opdkit.rollouts.segments import begin, extend, grow
from opdkit.rollouts.sources import on_policy
from opdkit.support import Sampled
from opdkit.tasks.problem import Problem
from opdkit.views.local import score

PROMPTS = [(5, 9, 30), (7,), (12, 3, 8, 20, 4, 11), (5, 9, 30)]
ASKED = [(Problem(str(i), "p"), ids) for i, ids in enumerate(PROMPTS)]
HOW = Sampling(group=3, max_new_tokens=13, eos_ids=(1, 3, 10, 12, 17))
KEYS = prompt_keys(PROMPTS, 4)
KEEP = Keep(3, hidden=True)


@pytest.fixture(scope="module")
def teacher(teacher_path) -> LanguageModel:
    return load_model(ModelConfig(path=teacher_path), "teacher")


def whole(lm, how=HOW, keep=KEEP, mixture=None):
    return on_policy(lm, ASKED, how, 4, keep, keys=KEYS, mixture=mixture)


def pieces(lm, tokens, how=HOW, keep=KEEP, mixture=None):
    grown = grow(lm, begin(ASKED, how, KEYS), how, lambda drafts: drafts, tokens, keep, mixture)
    return [draft.rollout(lm.tokenizer) for draft in grown]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert replace(a, capture=None) == replace(b, capture=None)
        for name in ("logp", "behaviour", "entropy", "top", "hidden"):
            torch.testing.assert_close(getattr(a.capture, name), getattr(b.capture, name), atol=2e-4, rtol=1e-4)
        assert torch.equal(a.capture.top_ids, b.capture.top_ids)


@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 40])
def test_uniform_numbers_do_not_depend_on_how_many_are_asked_for(length):
    assert torch.equal(noise("key", 2, length), noise("key", 2, 400)[:length])


@pytest.mark.parametrize("tokens", [1, 4, 13, None])
def test_pieces_give_what_is_sampled_in_one_go(lm, tokens):
    assert_same(pieces(lm, tokens), whole(lm))


def test_pieces_with_top_p_and_few_rows_at_a_time(lm):
    how = replace(HOW, top_p=0.8, temperature=0.7, max_rows=5)
    assert_same(pieces(lm, 5, how), whole(lm, how))


def test_pieces_of_a_mixture(lm, teacher):
    mixture = Mixture(teacher, 0.4, [(2, *ids) for ids in PROMPTS])
    assert_same(pieces(lm, 3, mixture=mixture), whole(lm, mixture=mixture))


def test_a_stop_string_across_two_pieces(lm):
    text = next(r.text for r in whole(lm) if r.text.find(r.text[2:4], 0, 5) == 2 and len(r.text) >= 6)
    how = replace(HOW, stop=(text[2:4],))
    expected = whole(lm, how)
    assert any(r.finish == "stop_string" and r.text == text[:2] for r in expected)
    assert_same(pieces(lm, 3, how), expected)  # characters 2 and 3 are in different pieces


def test_a_response_does_not_depend_on_its_companions(lm):
    drafts = extend(lm, begin(ASKED, HOW, KEYS), HOW, 4)
    alone = extend(lm, [drafts[5]], HOW)[0]
    assert alone.ids == extend(lm, drafts, HOW)[5].ids


def test_the_look_may_end_a_draft(lm):
    def look(drafts):
        return [replace(d, finish="drift") if len(d.ids) >= 4 and d.response == 1 else d for d in drafts]

    found = grow(lm, begin(ASKED, HOW, KEYS), HOW, look, 4)
    for draft, full in zip(found, whole(lm), strict=True):
        assert draft.ids == (full.response_ids if draft.response != 1 else full.response_ids[:4])
        assert draft.finish == ("drift" if draft.response == 1 and len(draft.ids) == 4 else full.finish)


def test_text_in_between_is_read_and_not_trained_on(lm):
    how, told = replace(HOW, group=1), (20, 21, 22)

    def look(drafts):
        return [d.heard(told) if d.turn == 0 and d.room > 3 else d for d in drafts]

    drafts = grow(lm, begin(ASKED, how, KEYS), how, look, keep=KEEP)
    found = [draft.rollout(lm.tokenizer) for draft in drafts]
    first = whole(lm, how)
    heard = 0
    for rollout, before in zip(found, first, strict=True):
        n = len(before.response_ids)
        if n + 3 >= how.max_new_tokens:
            assert rollout.turns is None and rollout.trained is None
            continue
        heard += 1
        rest = len(rollout.response_ids) - n - 3
        assert rollout.response_ids[: n + 3] == (*before.response_ids, *told) and rest >= 1
        assert rollout.trained == (*[True] * n, *[False] * 3, *[True] * rest)
        assert rollout.turns == (*[0] * (n + 3), *[1] * rest)
        assert rollout.capture.logp.shape == (n + rest,)
        assert len(rollout.response_ids) <= how.max_new_tokens
    assert heard >= 2
    step = flatten(found, head=lm.head())
    again = score(lm, found, step, Sampled(), budget=1000)  # of a model that reads the whole response
    torch.testing.assert_close(again.sampled, step.views["student"].sampled, atol=2e-4, rtol=1e-4)


def test_the_limit_counts_all_tokens_of_the_response_and_each_draft_has_its_own(lm):
    how = replace(HOW, group=1, eos_ids=(43,), max_new_tokens=6)
    drafts = extend(lm, begin(ASKED[:2], how, KEYS[:2]), how, 2)
    drafts[0] = drafts[0].heard((20, 21))
    drafts = extend(lm, drafts, how)
    assert [len(d.ids) for d in drafts] == [6, 6] and [d.finish for d in drafts] == ["length", "length"]
    assert extend(lm, drafts, how) == drafts


def test_equal_prompts_are_read_once(lm, monkeypatch):
    from opdkit.rollouts import sampler

    rows = []
    original = sampler.Decoder.__init__

    def count(self, lm, prompts, *rest):
        rows.append(len(prompts))
        original(self, lm, prompts, *rest)

    monkeypatch.setattr(sampler.Decoder, "__init__", count)
    extend(lm, begin(ASKED, HOW, KEYS), HOW, 1)
    assert rows == [3]


def test_a_place_that_leaves_the_context_is_refused(lm):
    with pytest.raises(DataError, match="expected 1 to 28"):
        sample(lm, [(5,) * 100], replace(HOW, group=1), 0, places=[Place(0, 0, 100)])
