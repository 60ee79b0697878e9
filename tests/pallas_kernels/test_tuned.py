"""Measured launch parameters: which file and which entry a call takes, and that writing keeps what others wrote."""

import json

import jax
import jax.numpy as jnp
import pytest

from pronghorn.pallas_kernels import tuned
from pronghorn.pallas_kernels.rms_norm import rms_norm
from tests.lowering import lower_for_h100

CHOICES = {"op": {"16-bit/64": (1, 2), "16-bit/512": (3, 4), "32-bit/64": (5, 6)}}


@pytest.fixture
def folder(tmp_path):
    tuned.write("NVIDIA Thing 80GB", "9.0", {"jax": "1"}, CHOICES, tmp_path)
    return tmp_path


def found(folder, wanted, kind="NVIDIA Thing 80GB", capability="9.0", **options):
    tuned.read.cache_clear()
    return tuned.measured(kind, capability, "op", wanted, folder=folder, **options)


def test_a_measured_size_is_found_by_device_kind_and_data_type(folder):
    assert (folder / "nvidia_thing_80gb.json").is_file()
    assert found(folder, "16-bit/64") == (1, 2)
    assert found(folder, "32-bit/64") == (5, 6)


def test_an_unmeasured_size_takes_the_nearest_and_the_larger_of_two(folder):
    assert found(folder, "16-bit/1024") == (3, 4)
    assert found(folder, "16-bit/32") == (1, 2)
    tuned.write("NVIDIA Thing 80GB", "9.0", {}, {"op": {"16-bit/256": (7, 8)}}, folder)
    assert found(folder, "16-bit/128") == (7, 8)
    assert found(folder, "16-bit/4096") is None  # more than a factor of four away
    assert found(folder, "8-bit/64") is None


def test_tiles_of_a_smaller_size_are_not_taken_where_they_would_not_fit(folder):
    assert found(folder, "16-bit/1024", at_least=True) is None
    assert found(folder, "16-bit/128", at_least=True) == (3, 4)


def test_another_device_of_the_same_capability_lends_its_choices(folder):
    assert found(folder, "16-bit/64", kind="NVIDIA Other") == (1, 2)
    assert found(folder, "16-bit/64", kind="NVIDIA Other", capability="8.0") is None


def test_writing_keeps_the_entries_of_other_sizes_and_ops(folder):
    tuned.write(
        "NVIDIA Thing 80GB",
        "9.0",
        {"jax": "2"},
        {"op": {"16-bit/64": (9, 9)}, "b": {"16-bit/1": (1,)}},
        folder,
    )
    content = json.loads((folder / "nvidia_thing_80gb.json").read_text())
    assert content["versions"] == {"jax": "2"} and content["device"] == "NVIDIA Thing 80GB"
    assert content["choices"]["op"] == {"16-bit/64": [9, 9], "16-bit/512": [3, 4], "32-bit/64": [5, 6]}
    assert content["choices"]["b"] == {"16-bit/1": [1]}


def test_the_package_ships_only_files_that_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        assert path.name == tuned.file_name(content["device"]) and content["compute_capability"]
        assert all(
            all(isinstance(n, int) for n in v)
            for by_key in content["choices"].values()
            for v in by_key.values()
        )


def test_a_candidate_is_launched_inside_its_block_only():
    x, weight = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.bfloat16)

    def lowered():
        return lower_for_h100(lambda x, w: rms_norm(x, w, eps=1e-6, implementation="pallas"), x, weight)

    before = lowered()
    with tuned.candidate("rms_norm_forward", (512, 8)):
        assert "grid_x = 32 : i32" in lowered() or lowered() != before
    assert lowered() == before
