"""Models in several files: all parts open with the first, and parts that do not belong together are told apart."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_bytes import I32, STRING, U16, gguf_bytes, key, tensor
from mpillama.errors import GGUFError
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType


def part_bytes(no: int, count: int, names: list[str], total: int | None = None, extra: tuple[bytes, ...] = ()) -> bytes:
    keys = [key("split.no", U16, no), key("split.count", U16, count), *extra]
    if total is not None:
        keys.append(key("split.tensors.count", I32, total))
    tensors = [tensor(name, (8,), GGMLType.F32, 32 * i) for i, name in enumerate(names)]
    return gguf_bytes(keys, tensors, b"".join(name.encode() * 32 for name in names))


def write_parts(folder: Path, names: list[list[str]]) -> list[Path]:
    """A model whose parts have these tensors; names of one letter, which is also every byte of their data."""
    paths = [folder / f"m-{no + 1:05}-of-{len(names):05}.gguf" for no in range(len(names))]
    for no, (path, part) in enumerate(zip(paths, names, strict=True)):
        extra = (key("general.architecture", STRING, "llama"),) if no == 0 else ()
        path.write_bytes(part_bytes(no, len(names), part, sum(map(len, names)), extra))
    return paths


def error_of(path: Path) -> str:
    with pytest.raises(GGUFError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_part_opens_all(tmp_path):
    # The first part of many split models has metadata only.
    paths = write_parts(tmp_path, [[], ["a", "b"], ["c"]])
    header = read_header(paths[0])
    assert header.paths == tuple(map(str, paths))
    assert [(t.name, t.part) for t in header.tensors.values()] == [("a", 1), ("b", 1), ("c", 2)]
    assert header.metadata["general.architecture"] == "llama"
    assert header.file_bytes == sum(path.stat().st_size for path in paths)
    for info in header.tensors.values():
        data = Path(header.paths[info.part]).read_bytes()
        assert data[info.offset : info.offset + info.nbytes] == info.name.encode() * 32


def test_relative_path(tmp_path, monkeypatch):
    write_parts(tmp_path, [["a"], ["b"]])
    monkeypatch.chdir(tmp_path)
    assert read_header("m-00001-of-00002.gguf").paths == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


def test_a_split_model_of_one_part_may_have_any_name(tmp_path):
    path = tmp_path / "anything.gguf"
    path.write_bytes(part_bytes(0, 1, ["a"]))
    assert list(read_header(path).tensors) == ["a"]


def test_names_are_kept_in_part_when_they_contain_odd_characters(tmp_path):
    folder = tmp_path / "a-00001-of-00002.gguf"
    folder.mkdir()
    for path in write_parts(folder, [["a"], ["b"]]):
        path.rename(folder / path.name.replace("m-", "Ünïcode -00007-of-00009.gguf-").replace(".gguf", ".GGUF"))
    (first, *_) = sorted(folder.iterdir())
    assert list(read_header(first).tensors) == ["a", "b"]


def test_another_part_names_the_first(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"], ["c"]])
    message = error_of(paths[1])
    assert message.startswith("m-00002-of-00003.gguf: is part 2 of 3; open the first part")
    assert "m-00001-of-00003.gguf" in message


def test_missing_part_is_named(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"], ["c"]])
    paths[2].unlink()
    message = error_of(paths[0])
    assert "part 3 of 3 is missing" in message
    assert str(paths[2]) in message


def test_renamed_first_part(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"]])
    paths[0].rename(tmp_path / "model.gguf")
    message = error_of(tmp_path / "model.gguf")
    assert message.startswith("model.gguf: is part 1 of 2, but its name does not end in -00001-of-00002.gguf")
    paths = write_parts(tmp_path, [["a"], ["b"]])
    paths[0].rename(tmp_path / "m-00001-of-00003.gguf")
    assert "its name does not end in -00001-of-00002.gguf" in error_of(tmp_path / "m-00001-of-00003.gguf")


def test_swapped_parts(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"], ["c"]])
    shutil.copy(paths[2], paths[1])
    message = error_of(paths[0])
    assert message.startswith("m-00002-of-00003.gguf: says that it is part 3 of 3, but is named as part 2 of 3")


def test_part_of_a_longer_model(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"]])
    paths[1].write_bytes(part_bytes(1, 4, ["b"]))
    assert "says that it is part 2 of 4, but is named as part 2 of 2" in error_of(paths[0])


def test_unsplit_file_under_the_name_of_a_part(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"]])
    paths[1].write_bytes(gguf_bytes())
    assert error_of(paths[0]).startswith("m-00002-of-00002.gguf: has no key split.no")


def test_tensor_in_two_parts(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b", "a"]])
    message = error_of(paths[0])
    assert message.startswith("m-00002-of-00002.gguf: tensor 'a' is also in m-00001-of-00002.gguf")


def test_number_of_tensors_is_checked(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"]])
    paths[1].write_bytes(part_bytes(1, 2, ["b", "c"]))
    assert "its 2 parts have 3 tensors, but split.tensors.count is 2" in error_of(paths[0])


def test_damaged_part_is_named(tmp_path):
    paths = write_parts(tmp_path, [["a"], ["b"]])
    paths[1].write_bytes(paths[1].read_bytes()[:-5])
    assert error_of(paths[0]).startswith("m-00002-of-00002.gguf: 5 bytes are missing at its end")


@pytest.mark.parametrize(
    "value", [key("split.count", STRING, "2"), key("split.count", I32, -2), key("split.count", 7, True)]
)
def test_split_count_that_is_no_count(tmp_path, value):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_bytes([key("split.no", U16, 0), value]))
    assert "key split.count is " in error_of(path)


def test_huge_split_count_costs_nothing(tmp_path):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_bytes([key("split.no", U16, 0), key("split.count", 10, (1 << 64) - 1)]))
    assert "is part 1 of 18446744073709551615, but its name does not end in" in error_of(path)


def test_what_the_gguf_package_splits(tmp_path, rng):
    weights = {f"t{i}": rng.standard_normal((3, 5)).astype(np.float32) for i in range(7)}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=3)
    for name, array in weights.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "model-00001-of-00003.gguf")
    assert [t.part for t in header.tensors.values()] == [0, 0, 0, 1, 1, 1, 2]
    for name, array in weights.items():
        info = header.tensors[name]
        data = Path(header.paths[info.part]).read_bytes()
        assert data[info.offset : info.offset + info.nbytes] == array.tobytes()
