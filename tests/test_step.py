"""The flat axis by hand: three sequences with turns and groups, one of which trains no token at all."""

import torch

from opdkit.head import TableRows
from opdkit.step import Candidates, Layout, Scores, Step

# sequence 0: tokens 0 1 2, its second turn starts at token 2; sequence 1: nothing trained; sequence 2: tokens 3 4
LAYOUT = Layout(
    seq=torch.tensor([0, 0, 0, 2, 2]),
    turn=torch.tensor([0, 0, 1, 3, 3]),  # turn 2 is all of sequence 1
    group=torch.tensor([0, 1, 0]),
)
X = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)


def test_sequence_functions():
    assert LAYOUT.sequences == 3
    assert LAYOUT.seq_len().tolist() == [3, 0, 2]
    assert LAYOUT.seq_sum(X).tolist() == [7.0, 0.0, 24.0]
    assert torch.equal(LAYOUT.seq_mean(X), torch.tensor([7 / 3, 0.0, 12.0], dtype=torch.float64))
    assert LAYOUT.spread(torch.tensor([5.0, 6.0, 7.0])).tolist() == [5.0, 5.0, 5.0, 7.0, 7.0]
    assert LAYOUT.position().tolist() == [0, 1, 2, 0, 1]


def test_turn_mean_counts_each_turn_on_its_own():
    assert LAYOUT.turn_mean(X).tolist() == [1.5, 4.0, 0.0, 12.0]


def test_group_functions_hand_back_to_every_member():
    assert LAYOUT.group_mean(torch.tensor([1.0, 10.0, 4.0])).tolist() == [2.5, 10.0, 2.5]
    assert LAYOUT.group_size().tolist() == [2, 1, 2]


def test_before_is_exclusive_and_after_inclusive_within_the_sequence():
    assert LAYOUT.before(X).tolist() == [0.0, 1.0, 3.0, 0.0, 8.0]
    assert LAYOUT.after(X).tolist() == [7.0, 6.0, 4.0, 24.0, 16.0]


def test_sequence_without_trained_tokens_may_come_first_or_last():
    first = Layout(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0, 0]))
    last = Layout(torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([0, 0]))
    x = torch.tensor([2.0, 3.0])
    assert first.seq_mean(x).tolist() == [0.0, 2.5] and last.seq_mean(x).tolist() == [2.5, 0.0]
    for layout in (first, last):
        assert layout.position().tolist() == [0, 1]
        assert layout.before(x).tolist() == [0.0, 2.0] and layout.after(x).tolist() == [5.0, 3.0]


def test_a_step_without_trained_tokens():
    empty = torch.zeros(0, dtype=torch.long)
    layout, x = Layout(empty, empty, torch.tensor([0, 0])), torch.zeros(0)
    assert layout.seq_len().tolist() == [0, 0] and layout.seq_mean(x).tolist() == [0.0, 0.0]
    assert (
        layout.turn_mean(x).shape == layout.before(x).shape == layout.after(x).shape == layout.position().shape == (0,)
    )


def test_prefix_sums_of_a_long_step_keep_float32_digits():
    lengths = [3000, 1, 5000]
    seq = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    layout = Layout(seq, seq, torch.arange(3))
    x = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
    parts = [part.double() for part in x.split(lengths)]
    before = torch.cat([part.cumsum(0) - part for part in parts])
    after = torch.cat([part.flip(0).cumsum(0).flip(0) for part in parts])
    assert torch.allclose(layout.before(x).double(), before, rtol=1e-6, atol=0.0)
    assert torch.allclose(layout.after(x).double(), after, rtol=1e-6, atol=0.0)  # the last tokens of a sequence too


def make_step() -> Step:
    column = torch.arange(5, dtype=torch.float64)
    table = column[:, None] * torch.ones(5, 3, dtype=torch.float64)
    ids, valid = torch.arange(10).reshape(5, 2), torch.tensor([[True, False]] * 5)
    candidates = Candidates(ids, valid, table[:, :2], table[:, :2] + 10, None, column + 20)
    student = Scores(column, column + 1, ids, table[:, :2] + 2, None, TableRows(table + 3))
    teacher = Scores(column + 4, candidates=candidates)
    return Step(LAYOUT, torch.arange(5) * 7, {"student": student, "teacher": teacher}, reward=torch.ones(3), horizon=9)


def test_rows_index_every_per_token_tensor_and_leave_the_sequences():
    rows = make_step().rows(torch.tensor([4, 1]))
    assert rows.tokens.tolist() == [28, 7]
    assert rows.layout.seq.tolist() == [2, 0] and rows.layout.turn.tolist() == [3, 0]
    assert rows.layout.group.tolist() == [0, 1, 0] and rows.reward.tolist() == [1.0, 1.0, 1.0] and rows.horizon == 9
    student, teacher = rows.views["student"], rows.views["teacher"]
    assert student.sampled.tolist() == [4.0, 1.0] and student.entropy.tolist() == [5.0, 2.0]
    assert student.top_ids.tolist() == [[8, 9], [2, 3]] and student.top.tolist() == [[6.0, 6.0], [3.0, 3.0]]
    assert student.candidates is None and student.full.log_probs(slice(None)).tolist() == [[7.0] * 3, [4.0] * 3]
    assert student.full.log_probs(torch.tensor([1])).tolist() == [[4.0] * 3]
    assert teacher.entropy is None and teacher.sampled.tolist() == [8.0, 5.0]
    assert teacher.candidates.ids.tolist() == [[8, 9], [2, 3]]
    assert teacher.candidates.student_tail is None and teacher.candidates.teacher_tail.tolist() == [24.0, 21.0]
    assert teacher.candidates.valid.tolist() == [[True, False]] * 2


def test_rows_of_rows_compose():
    once = make_step().rows(torch.tensor([1, 2, 4]))
    assert once.rows(torch.tensor([2, 0])).tokens.tolist() == make_step().rows(torch.tensor([4, 1])).tokens.tolist()
