"""Tensors read ahead: each once, within a budget, whatever order they are asked for in."""

import threading

import pytest

from pronghorn.converters.read_ahead import ReadAhead
from pronghorn.errors import InputError


class Tensor:
    nbytes = 100

    def __init__(self, value, error=None):
        self.value, self.error, self.reads = value, error, 0
        self.done = threading.Event()

    def read(self):
        self.reads += 1
        self.done.set()
        if self.error:
            raise self.error
        return self.value


def tensors(count):
    return {f"t{index}": Tensor(index) for index in range(count)}


def test_each_tensor_is_read_once_in_any_order():
    table = tensors(9)
    with ReadAhead(table, list(table), budget=250) as files:
        names = ["t0", "t8", "t1", "t2", "t4", "t3", "t5", "t6", "t7"]
        assert [files.read(name) for name in names] == [int(name[1:]) for name in names]
    # t8 came out of turn: read when it was asked for, and once more when its turn came.
    assert {name: tensor.reads for name, tensor in table.items() if name != "t8"} == dict.fromkeys(
        (name for name in table if name != "t8"), 1
    )


def test_no_more_than_the_budget_is_read_ahead():
    table = tensors(5)
    with ReadAhead(table, list(table), budget=250) as files:
        assert table["t1"].done.wait(5) and not table["t2"].done.wait(0.05)
        files.read("t0")
        assert table["t2"].done.wait(5) and not table["t4"].done.wait(0.05)


def test_a_tensor_larger_than_the_budget_is_read_all_the_same():
    table = tensors(2)
    with ReadAhead(table, list(table), budget=1) as files:
        assert [files.read(name) for name in table] == [0, 1]


def test_what_a_read_raises_is_raised_where_it_is_asked_for():
    table = tensors(2) | {"bad": Tensor(None, InputError("weights.safetensors: was cut short."))}
    with ReadAhead(table, list(table)) as files:
        assert files.read("t0") == 0
        with pytest.raises(InputError, match="cut short"):
            files.read("bad")
