"""State as JSON and tensors: everything comes back exactly, or is refused with its place."""

import math
import random

import numpy as np
import pytest
import torch
from tiny_run import identical, through_disk

from opdkit.errors import RunError
from opdkit.train.checkpoint import pack, rng_state, set_rng_state


def test_every_kind_of_value_comes_back_as_it_was(tmp_path):
    state = {
        "scalars": [None, True, 0, -1, 2**70, 0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan, "ü\n\ud800", ""],
        "empty": [{}, [], (), torch.empty(0), torch.empty(0, 3, dtype=torch.int32)],
        "tuples": ((1, (2.5, "x")), [(), ([],)]),
        "keys": {0: {"exp": torch.ones(2)}, "0": 1, (1, "a"): 2, None: 3, 0.5: 4, True: 5} | {"$tensor": "not one"},
        "tags": {"$dict": [[1, 2]], "$tuple": 3},
        "tensors": {
            "scalar": torch.tensor(3.0),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "bool": torch.tensor([True, False]),
            "half": torch.tensor([1.0, -0.0, torch.inf], dtype=torch.bfloat16),
            "double": torch.tensor([math.pi], dtype=torch.float64),
            "a/b": torch.tensor(1),
            "a": {"b": torch.tensor(2)},
        },
        "__metadata__": torch.tensor(4),
    }
    assert identical(through_disk(state, tmp_path), state)
    assert identical(through_disk(torch.arange(3), tmp_path), torch.arange(3))
    assert identical(through_disk({}, tmp_path), {})


def test_shared_and_non_contiguous_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"base": base, "again": base, "turned": base.T, "row": base[1], "step": base[::2, 1:]}
    back = through_disk(state, tmp_path)
    assert identical(back, state)
    assert back["again"] is back["base"]
    back["base"][1, 1] = -1.0
    assert back["row"].tolist() == [4.0, 5.0, 6.0, 7.0]


def test_a_small_slice_does_not_store_its_whole_memory():
    _, tensors = pack([torch.zeros(1_000_000)[:3]])
    assert tensors["0"].untyped_storage().nbytes() == 12


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(1.0), "state at method.gate.1 is a float32"),
        ({1, 2}, "state at method.gate.1 is a set"),
        (torch.zeros(2, dtype=torch.complex128), "complex128 tensor"),
        (torch.zeros(2).to_sparse(), "sparse_coo"),
        ({torch.zeros(1): 1}, "a dict with a Tensor as key"),
    ],
)
def test_what_cannot_come_back_exactly_is_refused_with_its_place(value, text):
    with pytest.raises(RunError, match=text):
        pack({"method": {"gate": (0, value)}})


def test_random_state_of_python_numpy_and_torch_comes_back(tmp_path):
    random.gauss(0, 1)  # leaves half a pair behind
    np.random.standard_normal()
    state = through_disk(rng_state(), tmp_path)
    draws = []
    for _ in range(2):
        set_rng_state(state)
        draws.append(
            (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        )
    assert draws[0] == draws[1]


def test_random_state_of_missing_cuda_devices_is_a_warning():
    state = rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    with pytest.warns(UserWarning, match="other random numbers"):
        set_rng_state(state)
