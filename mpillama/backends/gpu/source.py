"""The text that a compiler gets: kernel files with their includes put in place, and the codebooks as tables."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

import numpy as np

from mpillama.backends import quant_grids as grids
from mpillama.backends.gpu.device import Unit
from mpillama.gguf.types import GGMLType

_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
_TABLES = {
    GGMLType.IQ1_S: "iq1",
    GGMLType.IQ1_M: "iq1",
    GGMLType.IQ2_XXS: "iq2_xxs",
    GGMLType.IQ2_XS: "iq2_xs",
    GGMLType.IQ2_S: "iq2_s",
    GGMLType.IQ3_XXS: "iq3_xxs",
    GGMLType.IQ3_S: "iq3_s",
}


@lru_cache
def read(name: str) -> str:
    """Return a kernel file."""
    return (files(__package__) / "kernels" / name).read_text("utf-8")


def assemble(unit: Unit, warp: int, emulated: bool = False) -> str:
    """Return the whole text of a unit for warps of 32 or 64; only emulation needs its own header.

    Macros are in it. For each set of options CuPy compiles a kernel of its own, in each process.
    """
    done = {"" if emulated else "emulate.h"}

    def put(match: re.Match[str]) -> str:
        name = match[1]
        if name in done:
            return ""
        done.add(name)
        if name == "grids.cuh":
            return _table(dict(unit.defines).get("MPL_TYPE", 0))
        return expand(read(name).replace("#pragma once\n", ""))

    def expand(text: str) -> str:
        return _INCLUDE.sub(put, text)

    macros = "".join(f"#define {name} {value}\n" for name, value in (("MPL_WARP", warp), *unit.defines))
    return macros + expand(read(unit.file))


def _table(number: int) -> str:
    """Return the codebook that a type needs, as text."""
    name = _TABLES.get(GGMLType(number))
    if name is None:
        return ""
    values: np.ndarray = getattr(grids, name.upper())
    if name == "iq1":
        # From 0 to 16 instead of -8 to 8: sums of bytes then have no carries.
        values = (values.view(np.int8) + np.int8(8)).view(np.uint64)
    kind = "u64" if values.itemsize == 8 else "u32"
    numbers = ",".join(hex(value) for value in values.tolist())
    return f"static __device__ const {kind} {name}[{len(values)}] = {{{numbers}}};\n"
