"""The table of tensor types against the gguf package."""

import pickle

import gguf
import pytest

from mpillama.gguf.types import REMOVED_TYPES, GGMLType, row_bytes


@pytest.mark.parametrize("theirs", list(gguf.GGMLQuantizationType), ids=lambda t: t.name)
def test_every_type_of_the_gguf_package(theirs):
    ours = GGMLType(int(theirs))
    assert ours.name == theirs.name
    assert (ours.block_size, ours.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]


def test_numbers_are_used_or_removed_without_gaps():
    numbers = {int(t) for t in GGMLType}
    assert not numbers & REMOVED_TYPES
    assert numbers | REMOVED_TYPES == set(range(max(numbers) + 1))


def test_row_bytes_needs_whole_blocks():
    assert row_bytes(GGMLType.F32, 3) == 12
    assert row_bytes(GGMLType.Q4_0, 64) == 36
    assert row_bytes(GGMLType.Q6_K, 0) == 0
    with pytest.raises(ValueError, match="384 weights"):
        row_bytes(GGMLType.Q4_K, 384)


def test_members_survive_pickling():
    for type in GGMLType:
        assert pickle.loads(pickle.dumps(type)) is type
