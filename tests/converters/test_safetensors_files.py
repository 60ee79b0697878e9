"""Hostile and honest safetensors files. The reference reader and writer are the `safetensors` package's own."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pronghorn.converters import safetensors_files as st
from pronghorn.errors import InputError, RunError


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((7, 3)).astype(ml_dtypes.bfloat16),
        "c.bias": rng.standard_normal(9).astype(np.float16),
        "d.codes": rng.integers(0, 255, (11,)).astype(np.uint8),
        "e.step": np.asarray(3, np.int64),
        "f.empty": np.zeros((0, 4), np.float32),
    }


def write(path, values, **options):
    specs = {name: st.TensorSpec(value.dtype, value.shape) for name, value in values.items()}
    return st.write_file(path, specs, values.__getitem__, **options)


def write_folder(folder, values, **options):
    folder.mkdir(exist_ok=True)
    specs = {name: st.TensorSpec(value.dtype, value.shape) for name, value in values.items()}
    return st.write_weights(folder, specs, values.__getitem__, **options)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def refusal(path, reader=st.read_header):
    with pytest.raises(InputError) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    write(tmp_path / "x.safetensors", arrays(), metadata={"format": "pt", "note": "ü"})
    tensors, metadata = st.read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "note": "ü"}
    assert_same({name: tensor.read() for name, tensor in tensors.items()}, arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_reference_reader_reads_our_file_and_we_read_its(tmp_path):
    write(tmp_path / "ours.safetensors", arrays())
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="flax") as file:
        assert file.metadata() == {"format": "pt"}
        read = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    expected = arrays() | {"e.step": read["e.step"]}  # jax has no int64 here
    assert_same(read, expected)
    safetensors.numpy.save_file(arrays(), tmp_path / "theirs.safetensors")
    tensors, _ = st.read_header(tmp_path / "theirs.safetensors")
    assert_same({name: tensor.read() for name, tensor in tensors.items()}, arrays())


def test_shards_hold_at_most_their_limit_and_read_back_the_same(tmp_path):
    names = write_folder(tmp_path, arrays(), max_shard_bytes=64)
    assert names[0] == "model-00001-of-00003.safetensors" and names[-1] == st.INDEX_NAME
    index = json.loads((tmp_path / st.INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in arrays().values())
    assert set(index["weight_map"].values()) == set(names[:-1])
    for name in names[:-1]:
        assert sum(tensor.nbytes for tensor in st.read_header(tmp_path / name)[0].values()) <= 64
    assert_same({name: tensor.read() for name, tensor in st.open_weights(tmp_path).items()}, arrays())


def test_every_truncation_is_refused_in_words_that_name_the_file(tmp_path):
    write(tmp_path / "x.safetensors", arrays())
    data = (tmp_path / "x.safetensors").read_bytes()
    for keep in (0, 7, 8, 50, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:keep])
        assert "cut.safetensors" in refusal(tmp_path / "cut.safetensors"), keep


def test_no_flipped_header_bit_raises_anything_but_an_input_error(tmp_path):
    """A flip inside a name is a legal file; every other flip is refused; none crashes or reads out of bounds."""
    values = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    write(tmp_path / "x.safetensors", values)
    data = (tmp_path / "x.safetensors").read_bytes()
    path, refused = tmp_path / "flipped.safetensors", 0
    for byte in range(len(data) - values["w"].nbytes):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[byte] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                for tensor in st.read_header(path)[0].values():
                    assert tensor.read().nbytes == 24
            except InputError as error:
                refused += 1
                assert "flipped.safetensors" in str(error)
    assert refused > 400


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}, b"\0" * 8, "800 bytes"),
        ({"w": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}, b"\0" * 8, "truncated"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b"\0" * 8, "counts"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8, "counts"),
        ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"\0" * 8, "counts"),
        ({"w": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}}, b"", "truncated"),
        ({"w": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "lacks"),
        ({"w": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "Q7"),
        ({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, "dtype"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8, "hole"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 8, "no tensor"),
        ([], b"", "no JSON object"),
        (b'{"w": 1, "w": 2}', b"", "twice"),
        (b"[" * 100_000, b"", "JSON"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, header, data, words):
    assert words in refusal(raw_file(tmp_path / "x.safetensors", header, data))


def test_a_header_length_beyond_the_file_is_refused_before_it_is_allocated(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "header" in refusal(tmp_path / "x.safetensors")


def overlapping():
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {"v": one, "w": one}


def test_overlapping_tensors_are_refused(tmp_path):
    assert "overlap" in refusal(raw_file(tmp_path / "x.safetensors", overlapping(), b"\0" * 8))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors"]
)
def test_a_weight_map_cannot_leave_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "x.safetensors", {"w": np.zeros(3, np.float32)})
    (folder / st.INDEX_NAME).write_text(json.dumps({"weight_map": {"w": name}}))
    assert "plain names" in refusal(folder, st.open_weights)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, {"w": np.zeros(3, np.float32)})
    (folder / st.SINGLE_NAME).rename(folder / "real.safetensors")
    (folder / st.SINGLE_NAME).symlink_to("real.safetensors")
    assert st.open_weights(folder)["w"].shape == (3,)
    shutil.move(folder / "real.safetensors", tmp_path / "real.safetensors")
    (folder / st.SINGLE_NAME).unlink()
    (folder / st.SINGLE_NAME).symlink_to(tmp_path / "real.safetensors")
    assert "link" in refusal(folder, st.open_weights)


def test_the_hub_cache_layout_of_links_is_read(tmp_path):
    snapshot, blobs = tmp_path / "models--o--n/snapshots/abc", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "sha", {"w": np.ones(3, np.float32)})
    (snapshot / st.SINGLE_NAME).symlink_to("../../blobs/sha")
    assert st.open_weights(snapshot)["w"].read().tolist() == [1, 1, 1]


def test_missing_and_doubled_tensors_are_named(tmp_path):
    write_folder(tmp_path, arrays(), max_shard_bytes=64)
    index = json.loads((tmp_path / st.INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (tmp_path / st.INDEX_NAME).write_text(json.dumps(index))
    assert "ghost.weight" in refusal(tmp_path, st.open_weights)
    del index["weight_map"]["ghost.weight"]
    (tmp_path / st.INDEX_NAME).write_text(json.dumps(index))
    write(tmp_path / "model-00003-of-00003.safetensors", arrays())
    assert "'a.weight'" in refusal(tmp_path, st.open_weights)


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, arrays(), max_shard_bytes=64)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: is missing" in refusal(tmp_path, st.open_weights)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"w": "x.bin"}}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / st.INDEX_NAME).write_text(text)
    assert st.INDEX_NAME in refusal(tmp_path, st.open_weights)


def test_pickled_weights_are_refused_with_the_cure(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(tmp_path, st.open_weights)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_a_full_disk_is_asked_about_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(st.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RunError, match="free space"):
        write_folder(tmp_path / "out", arrays())
    assert not any((tmp_path / "out").iterdir())


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"w": np.ones(3, np.float32)})
    before = path.read_bytes()

    def fetch(name):
        if name == "b.weight":
            raise OSError(28, "No space left on device")
        return arrays()[name]

    specs = {name: st.TensorSpec(value.dtype, value.shape) for name, value in arrays().items()}
    with pytest.raises(RunError, match="disk is full"):
        st.write_file(path, specs, fetch)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, arrays())
    tensors, _ = st.read_header(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 20)
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(InputError, match="cut short"):
        last.read()
