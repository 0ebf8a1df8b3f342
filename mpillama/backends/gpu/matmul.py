"""Weights of the GPU backend, as the file has them, and their products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillama.backends.base import RawWeight
from mpillama.backends.gpu.device import SHARED_BYTES, Array, Unit
from mpillama.backends.gpu.elementwise import ACTIVATIONS, EXPERTS, MATVEC_TOKENS, ElementwiseOps
from mpillama.backends.gpu.inputs import StepInputs
from mpillama.backends.gpu.rounded import Rounded
from mpillama.backends.quants import SUPPORTED
from mpillama.gguf.types import GGMLType

FLOATS = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})
# As in matmul.cu.
_TILE_ROWS, _TILE_TOKENS = 64, 32
_SHARED_FLOATS = (_TILE_ROWS + _TILE_TOKENS) * 33 * 4
_SHARED_BLOCKS = 4 * sum(4 * (12 * n + 8) + 16 * (n + 2) for n in (_TILE_ROWS, _TILE_TOKENS))
# As in matvec.cuh.
_MATVEC_THREADS, _MATVEC_PARTS = 256, 3
# As in matmul_mma.cuh; a block of threads that shares the columns with others has at least so many steps.
_MMA_ROWS, _MMA_WARPS, _MMA_STEP, _MMA_SHARE = 128, 4, 128, 4
# Weights that are made floats at a time, for a product with many tokens.
GEMM_ELEMENTS = 32 << 20
_MAX_GRID = 65535


@dataclass(frozen=True)
class GpuMatrix:
    """A stack of matrices on the device: uint8 (n_mats, n_rows, row bytes).

    Attributes:
        n_in: elements of a row, pads included.
        pad: how many of them lie before the rank's own.
        unit: the kernels for the type.
    """

    data: Array
    type: GGMLType
    n_in: int
    pad: int
    unit: Unit

    @property
    def n_rows(self) -> int:
        """Rows of each matrix."""
        return int(self.data.shape[1])

    @property
    def row_bytes(self) -> np.int64:
        """Bytes from row to row."""
        return np.int64(self.data.shape[2])

    @property
    def mat_bytes(self) -> np.int64:
        """Bytes from matrix to matrix."""
        return np.int64(self.data.shape[1] * self.data.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.data.nbytes)


def _mma_bytes(w: GpuMatrix, n_tokens: int, warp: int) -> int:
    """Return the shared memory of matmul_mma.cuh: a span of weights and a step of activations, or two of each."""
    span = (
        _MMA_STEP * 2
        if w.type in FLOATS
        else max(_MMA_STEP, w.type.block_size) // w.type.block_size * w.type.block_bytes
    )
    pieces = (span + 14) // 16 + 1
    return (2 if warp == 32 else 1) * (_MMA_ROWS * 16 * (pieces | 1) + n_tokens * _MMA_STEP * 2)


def unit_of(type: GGMLType) -> Unit:
    """Return the kernels for weights of a type."""
    return Unit("matmul.cu", (("MPL_TYPE", int(type)),))


class MatmulOps(ElementwiseOps):
    """The ops of `Backend` that need matrices."""

    def begin_step(self, inputs: StepInputs) -> None:
        """Let the ops that follow find their batch on the device; nothing is kept of the step before."""
        self.inputs = inputs
        self.rounded.clear()
        self.halved.clear()

    def supports(self, type: GGMLType) -> bool:
        """Whether there is a decoder for the type."""
        return type in SUPPORTED

    def weight(self, raw: RawWeight) -> GpuMatrix:
        """Copy the slice to the device."""
        data, rest = raw.raw, -raw.raw.nbytes % 16
        if rest:
            # The kernels read whole pieces of 16 bytes.
            data = np.concatenate([data.reshape(-1), np.zeros(rest, np.uint8)])
        stored = self.device.upload(data)
        if rest:
            stored = stored[: raw.raw.size].reshape(raw.raw.shape)
        return GpuMatrix(stored, raw.type, raw.n_in, raw.pad[0], unit_of(raw.type))

    def embedding(self, tokens: np.ndarray, w: GpuMatrix, first: int) -> Array:
        """Return rows of the embedding, zeros for those that are elsewhere."""
        index = self.upload_index(tokens)
        out = self.device.empty((len(tokens), w.n_in))
        for start in range(0, len(tokens), _MAX_GRID):
            part = slice(start, start + _MAX_GRID)
            self._dequantize("dequantize_f32", w, 0, index[part], out[part], w.n_rows, first)
        return out

    def linear(self, x: Array, w: GpuMatrix) -> Array:
        """Return x W^T."""
        n_tokens = int(x.shape[0])
        out = self.device.empty((n_tokens, w.n_rows))
        if out.size == 0:
            return out
        if n_tokens <= MATVEC_TOKENS:
            self._matvec(x, [w], [out], n_tokens)
        elif self.device.gemm_tokens and n_tokens >= self.device.gemm_tokens:
            self._gemm(x, w, out)
        else:
            self._tiles(x, w, out, n_tokens)
        return out

    def linears(self, x: Array, ws: Sequence[GpuMatrix]) -> list[Array]:
        """Return `linear` of each of several matrices; for few tokens, those of one type together."""
        n_tokens = int(x.shape[0])
        if n_tokens > MATVEC_TOKENS:
            return [self.linear(x, w) for w in ws]
        outs = [self.device.empty((n_tokens, w.n_rows)) for w in ws]
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, w in enumerate(ws):
            if outs[i].size:
                groups.setdefault((w.unit, w.n_in, w.pad), []).append(i)
        for group in groups.values():
            for start in range(0, len(group), _MATVEC_PARTS):
                some = group[start : start + _MATVEC_PARTS]
                self._matvec(x, [ws[i] for i in some], [outs[i] for i in some], n_tokens)
        return outs

    def gated_linear(self, activation: str, x: Array, gate: GpuMatrix, up: GpuMatrix) -> Array:
        """Return `gated` of two `linear`."""
        n_tokens = int(x.shape[0])
        alike = (gate.unit, gate.n_in, gate.pad, gate.n_rows) == (up.unit, up.n_in, up.pad, up.n_rows)
        if n_tokens > MATVEC_TOKENS or not alike:
            return self.gated(activation, *self.linears(x, [gate, up]))
        out = self.device.empty((n_tokens, gate.n_rows))
        if out.size:
            fits = self._is_rounded(out) and gate.n_rows <= 32 * self.counters.size
            results = self.new_rounded(out, gate.n_rows) if fits else None
            self._matvec(x, [gate, up], [out], n_tokens, activation=ACTIVATIONS[activation], rounded=results)
        return out

    def _matvec(
        self,
        x: Array,
        ws: Sequence[GpuMatrix],
        outs: Sequence[Array],
        n_tokens: int,
        *,
        activation: int = -1,
        experts: Array | None = None,
        rounded: Rounded | None = None,
    ) -> None:
        """Start one kernel for up to three matrices alike, or for gate and up.

        Args:
            x: of all.
            ws: of one type and width.
            outs: of each; of both where there is an activation.
            n_tokens: rows of an output: tokens or pairs.
            activation: number of the gated activation; -1: none.
            experts: the matrix of each pair.
            rounded: for the output of gate and up in 8 bits too.
        """
        w, none = ws[0], [None] * _MATVEC_PARTS
        rows = [np.int32(0)] * _MATVEC_PARTS
        rows[: len(outs)] = [np.int32(part.n_rows) for part in ws[: len(outs)]]
        width = 1 if experts is not None else next(width for width in (1, 2, 4, 8) if width >= n_tokens)
        group = (4 if w.type in FLOATS or width == 8 else 8) // (1 if activation < 0 else 2)
        warps, shared = self._matvec_shape(w)
        grid = (sum(-(-int(n) // group) for n in rows), 1 if experts is None else n_tokens)
        share = 1 if experts is None or x.ndim == 3 else int(experts.shape[1])
        args = (
            *[*(part.data for part in ws), *none][:_MATVEC_PARTS],
            *(w.row_bytes, w.mat_bytes, experts, np.int32(share)),
            *self._operand(x, w),
            *[*outs, *none][:_MATVEC_PARTS],
            *rows,
            *(np.int32(activation), np.int32(w.n_in), np.int32(n_tokens)),
            *(self.counters, *(rounded or none)),
        )
        self.device.launch(w.unit, f"matvec_{width}", grid, warps * self.device.warp, args, shared)

    def _matvec_shape(self, w: GpuMatrix) -> tuple[int, int]:
        """Return the warps of a block, all of them with about as many chunks of a row, and its shared memory."""
        warp, ring = self.device.warp, 4 * 8 * 4
        most, unit = _MATVEC_THREADS // warp, 16 // w.type.block_bytes if w.type in FLOATS else 32
        if w.type not in FLOATS:
            pieces = (warp * 32 // w.type.block_size * w.type.block_bytes + 14) // 16 + 1
            stage = pieces * 16 + 16
            ring = stage * (2 if not self.device.async_copies else 4 if stage > 640 else 8)
            most = min(most, SHARED_BYTES // ring)
        chunks = max(1, -(-w.n_in // (warp * unit)))
        warps = -(-chunks // -(-chunks // most))
        return warps, warps * ring

    def expert_linear(self, x: Array, w: GpuMatrix, experts: Array) -> Array:
        """Multiply each token by the matrices of its experts."""
        n_tokens, n_used = experts.shape
        n_pairs = n_tokens * n_used
        out = self.device.empty((n_tokens, n_used, w.n_rows))
        if out.size == 0:
            return out
        if n_tokens <= MATVEC_TOKENS:
            self._matvec(x, [w], [out], n_pairs, experts=experts)
        else:
            self._tiles(x, w, out, n_pairs, experts)
        return out

    def _tiles(self, x: Array, w: GpuMatrix, out: Array, n_tokens: int, experts: Array | None = None) -> None:
        """Multiply in tiles, whose weights are decoded once for all their tokens.

        Args:
            x: of tokens, or of pairs.
            w: the matrix, or those of all experts.
            out: rows of tokens or pairs.
            n_tokens: how many there are.
            experts: the matrix of each pair.
        """
        on_units = self.device.matrix_units and w.type != GGMLType.F32
        n_mats = int(w.data.shape[0])
        # Tiles of 64 do with half of the decoding, but most experts do not have so many; their floats have no room.
        wide = on_units and w.type not in FLOATS and n_tokens > 32 and (experts is None or n_tokens >= 48 * n_mats)
        size = 64 if wide else _TILE_TOKENS
        rows, n_tiles = _MMA_ROWS if on_units else _TILE_ROWS, -(-n_tokens // size)
        tiles, order, share = None, None, 1
        if experts is not None:
            tiles, order = self._group(experts, n_mats, size)
            n_tiles, share = int(tiles.shape[0]), int(experts.shape[1]) if x.ndim == 2 else 1
        matrix, which = (w.data, w.row_bytes, w.mat_bytes), (tiles, order, np.int32(share))
        sizes = np.int32(w.n_rows), np.int32(w.n_in), np.int32(n_tokens)
        grid = -(-w.n_rows // rows), n_tiles
        if not on_units:
            args = (*matrix, *which, *self._operand(x, w), out, *sizes)
            shared = _SHARED_FLOATS if w.type in FLOATS else _SHARED_BLOCKS
            self.device.launch(w.unit, "matmul", grid, 256, args, shared)
            return
        n_shares = 1 if experts is not None else self._mma_shares(w, grid[0] * grid[1])
        result = out if n_shares == 1 else self.device.empty((n_shares, *out.shape))
        args = (*matrix, *which, *self._halves_of(x, -(-w.n_in // 32) * 32, w.pad), result, *sizes)
        warp = self.device.warp
        shared = _mma_bytes(w, size, warp)
        self.device.launch(w.unit, f"matmul_mma_{size}", (*grid, n_shares), _MMA_WARPS * warp, args, shared)
        if n_shares > 1:
            self.run.elements("sum_parts", out.size, result, np.int32(n_shares), np.int64(out.size), out)

    def _mma_shares(self, w: GpuMatrix, n_blocks: int) -> int:
        """Return how many blocks share the columns of a row, so that all multiprocessors have two of them."""
        return max(1, min(2 * self.device.n_cores // n_blocks, w.n_in // (_MMA_SHARE * _MMA_STEP)))

    def _group(self, experts: Array, n_expert: int, size: int) -> tuple[Array, Array]:
        """Return tiles of up to ``size`` pairs that share an expert, and the pairs by expert."""
        n_pairs = int(experts.size)
        # One more for what is on other ranks.
        n_tiles = n_pairs // size + min(n_expert + 1, n_pairs)
        tiles, order = self.device.empty((n_tiles, 3), np.int32), self.device.empty((n_pairs,), np.int32)
        sizes = np.int32(n_pairs), np.int32(n_expert), np.int32(size), np.int32(n_tiles)
        shared = 4 * (3 * (n_expert + 1) + 1)
        self.device.launch(EXPERTS, "group_pairs", (1,), 256, (experts, *sizes, order, tiles), shared)
        return tiles, order

    def _halves_of(self, x: Array, n_in: int, pad: int) -> Rounded:
        """Return activations in float16, in rows of ``n_in`` of which ``pad`` zeros come first, and their scales."""
        known = self.halved.find(x, n_in, pad)
        if known is None:
            n_own = int(x.shape[-1])
            n_rows = x.size // n_own
            arrays = self.device.empty((n_rows, n_in), np.uint16), self.device.empty((n_rows, 1))
            known = self.halved.keep(x, n_in, pad, arrays)
            self.run.rows("halve", n_rows, n_in, x, np.int32(n_own), np.int32(pad), np.int32(n_in), *known)
        return known

    def _operand(self, x: Array, w: GpuMatrix) -> tuple[Any, ...]:
        """Return the activations as the kernels for ``w`` take them; often the op that made them has rounded them."""
        n_own = int(x.shape[-1])
        if w.type in FLOATS and n_own == w.n_in:
            return (x,)
        if w.type in FLOATS:
            out = self.device.empty((*x.shape[:-1], w.n_in))
            sizes = np.int32(n_own), np.int32(w.pad), np.int32(w.n_in), np.int64(out.size)
            self.run.elements("pad", out.size, x, *sizes, out)
            return (out,)
        known = self.rounded.find(x, w.n_in, w.pad)
        if known is None:
            known = self.new_rounded(x, w.n_in, w.pad)
            n_units = int(known[0].shape[0])
            sizes = np.int32(n_own), np.int32(w.pad), np.int32(w.n_in // 32), np.int64(n_units)
            self.run.elements("quantize", n_units * 8, x, *sizes, *known)
        return known

    def _dequantize(
        self, kernel: str, w: GpuMatrix, start: int, index: Array | None, out: Array, n_rows: int, first: int = 0
    ) -> None:
        if out.size == 0:
            return
        units = w.n_in if w.type in FLOATS else w.n_in // 32
        block = min(256, -(-units // self.device.warp) * self.device.warp)
        data = w.data.reshape(-1)[start * int(w.row_bytes) :] if start else w.data
        args = (data, w.row_bytes, index, np.int32(first), out, np.int32(w.n_in), np.int32(n_rows))
        self.device.launch(w.unit, kernel, (-(-units // block), int(out.shape[0])), block, args)

    def _halves(self, w: GpuMatrix, start: int, stop: int) -> Array:
        """Return rows of weights as float16."""
        if w.type == GGMLType.F16:
            return w.data.reshape(-1).view(np.float16).reshape(w.n_rows, w.n_in)[start:stop]
        rows = self.device.empty((stop - start, w.n_in), np.uint16)
        self._dequantize("dequantize_f16", w, start, None, rows, stop - start)
        return rows.view(np.float16)

    def _gemm(self, x: Array, w: GpuMatrix, out: Array) -> None:
        """Make the weights floats, some rows at a time, and multiply: F32 in float32, all others in float16."""
        n_tokens = int(x.shape[0])
        if w.type == GGMLType.F32:
            (padded,) = self._operand(x, w)
            self.device.gemm(padded, w.data.reshape(-1).view(np.float32).reshape(w.n_rows, w.n_in), out)
            return
        halves, scales = self._halves_of(x, w.n_in, w.pad)
        result = self.device.empty((w.n_rows, n_tokens))
        step = min(_MAX_GRID, max(1, GEMM_ELEMENTS // w.n_in))
        for start in range(0, w.n_rows, step):
            stop = min(w.n_rows, start + step)
            # Transposed, so that the result of some rows is in one piece.
            self.device.gemm(self._halves(w, start, stop), halves.view(np.float16), result[start:stop])
        n_row, n_tok, size = np.int32(w.n_rows), np.int32(n_tokens), np.int64(out.size)
        self.run.elements("transpose_scaled", out.size, result, scales, n_row, n_tok, size, out)
