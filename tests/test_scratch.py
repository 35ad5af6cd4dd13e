"""Rooms that a thread keeps: one for each name and thread, and none where there may be none."""

import threading

import pytest
import torch
from test_head_products import HIDDEN, leaves, terms_of
from torch._subclasses.fake_tensor import FakeTensorMode

from opdkit import scratch
from opdkit.head import objective

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def empty():
    scratch.release()
    yield
    scratch.release()


def room(name: str, rows: int, width: int = 5, like: torch.Tensor = LIKE, dtype: torch.dtype = torch.float32):
    return scratch.room(name, rows, width, like, dtype)


def test_a_name_has_one_memory_that_grows_and_never_shrinks():
    first = room("a", 4)
    assert first.shape == (4, 5) and first.is_contiguous()
    assert room("a", 2, 10).data_ptr() == first.data_ptr() == room("a", 1).data_ptr()
    larger = room("a", 8)
    assert larger.numel() == 40 and room("a", 4).data_ptr() == larger.data_ptr()


def test_names_types_and_threads_are_apart():
    found = [room("a", 2), room("b", 2), room("a", 2, dtype=torch.float64)]
    other: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: other.append(room("a", 2)))
    thread.start()
    thread.join()
    assert len({t.data_ptr() for t in [*found, *other]}) == 4


def test_what_is_released_is_gone(monkeypatch):
    room("a", 2)
    scratch.release()
    assert not scratch._kept.rooms
    monkeypatch.setattr(scratch, "KEPT", 9)
    assert room("a", 2).shape == (2, 5) and not scratch._kept.rooms  # too large to be kept
    room("a", 1)
    assert len(scratch._kept.rooms) == 1


def test_tensors_without_numbers_and_other_devices_keep_nothing():
    with FakeTensorMode():
        assert type(room("a", 2, like=torch.zeros(1))) is not torch.Tensor
    assert room("a", 2, like=torch.zeros(1, device="meta")).device.type == "meta"
    assert not scratch._kept.rooms


def test_a_room_made_while_sampling_serves_a_pass_with_a_gradient():
    with torch.inference_mode():
        room("chunk", 64, 64, dtype=torch.float64)
    hidden, head = leaves({}, bias=False)
    objective(hidden, head, terms_of(("reverse_kl_full",)))[0].backward()
    assert hidden.grad is not None and hidden.grad.shape == HIDDEN.shape


def test_what_a_room_held_before_changes_nothing():
    found = []
    for fill in (0.0, torch.nan):
        for name in ("chunk", "teacher 0"):
            room(name, 64, 64, dtype=torch.float64).fill_(fill)
        hidden, head = leaves({}, bias=False)
        value, rows = objective(hidden, head, terms_of(("reverse_kl_full", "jsd_full")), 3)
        value.backward()
        found.append([value.detach(), *rows, hidden.grad, head.weight.grad])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
