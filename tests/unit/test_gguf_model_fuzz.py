"""Random metadata and tensor tables: a sound configuration or one clear line, no other exception, little memory."""

import dataclasses
import math
import tracemalloc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from gguf_bytes import ARRAY, STRING, array_body, gguf_bytes, key
from headers import check_message, strings, use
from mpillama.architectures import ARCHITECTURES
from mpillama.backends.reference import ReferenceBackend
from mpillama.config import read_config
from mpillama.errors import UserError
from mpillama.gguf.reader import GGUFHeader, TensorInfo, read_header
from mpillama.gguf.types import GGMLType
from mpillama.loader import load_weights
from mpillama.sharding import Sharding
from mpillama.tensors import expected_tensors, model_tensors
from tiny import write_llama

F32 = GGMLType.F32
MIB = 1 << 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> GGUFHeader:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return read_header(write_llama(path, np.random.default_rng(0), GGMLType.Q8_0))


class Recorder(Mapping[str, Any]):
    """Metadata that remember what was asked of them, so that the fuzz knows the keys that a model reads."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata, self.asked = metadata, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self._metadata[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metadata)

    def __len__(self) -> int:
        return len(self._metadata)


def sound_header(arch: str, experts: bool) -> GGUFHeader:
    """The header of a small model of any architecture, with the tensors that its configuration asks for."""
    sizes = {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 16,
        "logit_scale": 2.0,
    }
    if experts:
        sizes |= {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32}
    metadata = {"general.architecture": arch} | {f"{arch}.{name}": value for name, value in sizes.items()}
    embd = TensorInfo("token_embd.weight", F32, (64, 50), 0, 0)
    cfg = read_config(GGUFHeader(("m.gguf",), 3, 32, metadata, {embd.name: embd}, 0))
    tensors, offset = {}, 0
    for want in expected_tensors(cfg):
        if want.required:
            # The gate of a fused pair is in the first rows of ffn_up.
            fused = cfg.arch.fused_gate_up and not experts and want.name.endswith(("ffn_gate.weight", "ffn_up.weight"))
            if fused and "gate" in want.name:
                continue
            shape = (want.shape[0], 2 * want.shape[1]) if fused else want.shape
            tensors[want.name] = TensorInfo(want.name, F32, shape, 0, offset)
            offset += tensors[want.name].nbytes
    return GGUFHeader(("m.gguf",), 3, 32, metadata, tensors, offset)


INTEGERS = [0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 65, 127, 1024, 1 << 14, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
INTEGERS += [-n for n in INTEGERS] + [(1 << 63) - 1, -(1 << 63), 1 << 63, (1 << 64) - 1]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1.0000001, 1e-45, 5e-324, -5e-324, 1e-12, 1e15, 3.4e38, 1.79e308, -1e308]
FLOATS += [math.nan, math.inf, -math.inf]
TEXTS = ["", "none", "linear", "yarn", "longrope", "llama", "a\nb", "\x1b[2J", "\ufffd", "x" * 10_000]


def random_value(rng: np.random.Generator) -> Any:
    """A value of any kind that a GGUF file can have, or None: no such key."""
    match int(rng.integers(8)):
        case 0:
            return None
        case 1 | 2:
            return INTEGERS[int(rng.integers(len(INTEGERS)))]
        case 3:
            return FLOATS[int(rng.integers(len(FLOATS)))]
        case 4:
            return bool(rng.integers(2))
        case 5:
            return TEXTS[int(rng.integers(len(TEXTS)))]
        case 6:
            dtype = np.dtype(rng.choice(["u1", "i1", "<i4", "<u8", "<i8", "<f4", "<f8", "?"]))
            n = int(rng.integers(0, 5))
            # Half of the arrays repeat one number, which readers may take for a single one.
            raw = rng.integers(0, 256, (1 if rng.integers(2) else n, dtype.itemsize), dtype=np.uint8)
            return np.resize(raw.reshape(-1) % 2 == 1 if dtype.kind == "b" else raw.reshape(-1).view(dtype), n)
        case _:
            return strings(*TEXTS[: int(rng.integers(4))]) if rng.integers(2) else [np.arange(3), strings("x")]


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("arch", [arch.name for arch in ARCHITECTURES])
def test_random_values_of_all_keys_that_a_model_reads(arch, experts, rng):
    header = sound_header(arch, experts)
    recorder = Recorder(header.metadata)
    use(dataclasses.replace(header, metadata=recorder))
    names = sorted(recorder.asked)
    assert {f"{arch}.block_count", f"{arch}.rope.freq_base", "general.architecture"} <= set(names)
    n_refused = 0
    tracemalloc.start()
    try:
        for _ in range(200):
            changed = rng.choice(names, int(rng.integers(1, 4)), replace=False)
            metadata = {**header.metadata, **{str(name): random_value(rng) for name in changed}}
            metadata = {name: value for name, value in metadata.items() if value is not None}
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                use(dataclasses.replace(header, metadata=metadata))
            except UserError as error:
                check_message(error)
                n_refused += 1
            assert tracemalloc.get_traced_memory()[1] - before < 2 * MIB, metadata
    finally:
        tracemalloc.stop()
    assert 20 < n_refused < 195


def test_random_tensor_tables(llama, rng):
    names = list(llama.tensors)
    types, dims = list(GGMLType), [1, 2, 32, 64, 96, 128, 256, 512, 768, 1 << 30]
    n_refused = 0
    for _ in range(1000):
        tensors = dict(llama.tensors)
        for _ in range(int(rng.integers(1, 3))):
            name = names[int(rng.integers(len(names)))]
            info = tensors.get(name, llama.tensors[name])
            match int(rng.integers(6)):
                case 0:
                    tensors.pop(name, None)
                case 1:
                    type = types[int(rng.integers(len(types)))]
                    if info.shape[0] % type.block_size == 0:
                        tensors[name] = dataclasses.replace(info, type=type)
                case 2 | 3:
                    shape = tuple(int(n) for n in rng.choice(dims, int(rng.integers(1, 5))))
                    tensors[name] = dataclasses.replace(info, shape=(256 * shape[0], *shape[1:]))
                case 4:
                    other = names[int(rng.integers(len(names)))]
                    tensors[name] = dataclasses.replace(llama.tensors[other], name=name)
                case 5:
                    new = str(rng.choice(["blk.0.attn_qkv", "blk.1.attn_q", "output", "blk.0.ffn_up", "rope_freqs"]))
                    new += str(rng.choice([".weight", ".bias", ".scale"]))
                    tensors[new] = dataclasses.replace(info, name=new)
        # Types and shapes were changed but not the file: its size is no bound here.
        header = dataclasses.replace(llama, tensors=tensors, file_bytes=1 << 62)
        try:
            use(header)
        except UserError as error:
            check_message(error)
            n_refused += 1
    assert 200 < n_refused < 1000


def test_damage_that_keeps_the_format_of_a_real_file(tmp_path, rng):
    """Numbers in the header of a real file are overwritten; what opens is loaded on two ranks."""
    path = write_llama(tmp_path / "m.gguf", rng, n_embd=64, n_head_dim=16, n_ff=64, n_vocab=32)
    sound = path.read_bytes()
    start = min(info.offset for info in read_header(path).tensors.values())
    n_loaded = 0
    for _ in range(300):
        at = int(rng.integers(24, start - 8))
        data = bytearray(sound)
        width = int(rng.choice([1, 4]))
        number = int(rng.choice([0, 1, 2, 3, 16, 64, 128, 255]))
        data[at : at + width] = number.to_bytes(width, "little")
        path.write_bytes(data)
        try:
            header = read_header(path)
            cfg = use(header)
            tensors = model_tensors(header, cfg)
            for rank in range(2):
                sharding = Sharding(cfg, [2.0, 1.0])
                _, n_read = load_weights(header.paths, tensors, sharding, rank, ReferenceBackend())
                assert n_read <= len(data)
            n_loaded += 1
        except UserError as error:
            check_message(error)
    assert 0 < n_loaded < 300


def test_what_the_fuzz_is_made_of(tmp_path):
    """Arrays of texts and of arrays in these tests are those that the reader makes."""
    body = key("a", 4, 0)[:-8] + b"\x09\0\0\0" + array_body(STRING, ["x", "yz"])
    nested = key("b", 4, 0)[:-8] + b"\x09\0\0\0" + array_body(ARRAY, [array_body(4, [1])])
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([body, nested]))
    metadata = read_header(path).metadata
    assert metadata["a"] == strings("x", "yz")
    assert isinstance(metadata["b"], list)
    assert isinstance(metadata["b"][0], np.ndarray)
