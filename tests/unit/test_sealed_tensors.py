"""A sealed file gives back what was written, is a safetensors file, and shows every changed byte before it counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from state.exceptions import StoreDamaged, StoreUnreadable
from state.reading.sealed_tensors import BLOCK_BYTES, SealedTensors, write_sealed

TENSORS = {
    "bytes": np.arange(7, dtype=np.uint8),
    "floats": np.linspace(0, 1, 9000, dtype=np.float32).reshape(3000, 3),
    "hashes": np.arange(5000, dtype=np.uint64) << np.uint64(20),
    "scalar": np.asarray(0.25),
    "nothing": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path):
    write_sealed(tmp_path / "file", TENSORS, {"format": "test"})
    return tmp_path / "file"


def test_tensors_come_back_whole_in_part_and_by_rows(path):
    sealed = SealedTensors(path)
    for name, array in TENSORS.items():
        found = sealed.whole(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(sealed.part("floats", 1000, 1002), TENSORS["floats"][1000:1002])
    np.testing.assert_array_equal(sealed.rows("hashes", np.array([4999, 0, 4999])), TENSORS["hashes"][[4999, 0, 4999]])
    assert sealed.metadata["format"] == "test"
    assert (sealed.length("floats"), sealed.length("absent")) == (3000, 0)


def test_any_reader_of_safetensors_takes_it(path):
    with safe_open(path, framework="numpy") as file:
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
        assert file.metadata()["format"] == "test"


def test_nothing_can_be_written_through_it(path):
    assert not SealedTensors(path).whole("floats").flags.writeable


def test_the_file_is_replaced_whole_and_an_open_reader_keeps_the_old(path):
    old = SealedTensors(path)
    write_sealed(path, {"floats": np.zeros(3, np.float32)}, {"format": "other"})
    np.testing.assert_array_equal(old.whole("floats"), TENSORS["floats"])
    assert SealedTensors(path).length("floats") == 3
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def everything(path):
    sealed = SealedTensors(path)
    return {name: sealed.whole(name).tobytes() for name in TENSORS}, sealed.metadata


@given(st.data())
def test_a_changed_byte_is_found_wherever_it_is(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("sealed") / "file"
    write_sealed(path, TENSORS, {"format": "test"})
    before = everything(path)
    packed = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(packed)
    try:
        found = everything(path)
    except StoreDamaged as error:
        found = str(error)
    # the byte may be one that says nothing: a space after the header, or the padding
    assert found == before or "damaged or foreign; restore it, or run again" in found


def test_damage_is_found_where_it_is_used_and_does_not_hinder_the_rest(path):
    packed = bytearray(path.read_bytes())
    packed[packed.index((4998 << 20).to_bytes(8, "little"))] ^= 1
    path.write_bytes(packed)
    sealed = SealedTensors(path)
    np.testing.assert_array_equal(sealed.part("hashes", 0, 9), TENSORS["hashes"][:9])
    with pytest.raises(StoreDamaged, match="fails its checksum near byte 32,768 of its data"):
        sealed.rows("hashes", np.array([4998]))
    assert 4998 * 8 // BLOCK_BYTES == 2


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_is_refused(path, kept):
    packed = path.read_bytes()
    path.write_bytes(packed[:kept])
    with pytest.raises(StoreDamaged, match=r"is empty|has no header of ours"):
        SealedTensors(path)


def test_a_file_that_grew_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StoreDamaged, match="longer than what it names"):
        SealedTensors(path)


def test_a_plain_safetensors_file_is_foreign(tmp_path):
    from safetensors.numpy import save_file

    save_file({"floats": np.zeros(3, np.float32)}, tmp_path / "file")
    with pytest.raises(StoreDamaged, match="has no header of ours"):
        SealedTensors(tmp_path / "file")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(StoreUnreadable, match="cannot be read: No such file"):
        SealedTensors(tmp_path / "file")
