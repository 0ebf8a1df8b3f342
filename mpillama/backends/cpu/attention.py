"""The KV cache of the CPU backend, and attention over it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpillama import _cpu
from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch
from mpillama.backends.cpu.buffers import Buffers
from mpillama.backends.cpu.elementwise import CpuRopeTable
from mpillama.backends.cpu.tiles import read_keys, read_values
from mpillama.backends.kv_codec import check_cache_type


class AttentionOps:
    """The ops of `Backend` that need a KV cache, on a pool of threads.

    Scores, weights and sums are float32; only what the cache keeps is rounded. On AMX the factors of many queries'
    products have 16 bits, as sums of two of bfloat16, unless the cache keeps f32. The result does not depend on the
    number of threads.
    """

    pool: _cpu.Pool
    kernels: Any
    buffers: Buffers

    def new_cache(self, n_blocks: int, n_head_kv: int, n_k: int, n_v: int, type_k: str, type_v: str) -> Any:
        """Reserve the KV cache of one block of the model, for n_blocks * KV_BLOCK tokens.

        Args:
            n_blocks: of KV_BLOCK tokens.
            n_head_kv: KV heads of this rank.
            n_k: elements of a key.
            n_v: elements of a value.
            type_k: one of `kv_codec.CACHE_TYPES`.
            type_v: likewise.

        Raises:
            UsageError: there is no such type, or it keeps blocks of 32 and the heads are not made of such.
        """
        check_cache_type("keys", type_k, n_k)
        check_cache_type("values", type_v, n_v)
        return _cpu.KVCache(n_blocks, n_head_kv, n_k, n_v, type_k, type_v)

    def copy_blocks(self, cache: Any, copies: np.ndarray) -> None:
        """Copy blocks within a cache."""
        _cpu.copy_blocks(cache, copies)

    def read_blocks(self, cache: Any, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of blocks; see `Backend.read_blocks`."""
        return read_keys(cache.k[blocks], cache.type_k), read_values(cache.v[blocks], cache.type_v)

    def write_blocks(self, cache: Any, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into blocks: attention without queries."""
        n_tokens = len(blocks) * KV_BLOCK
        k, v = (np.ascontiguousarray(x, np.float32).reshape(n_tokens, *x.shape[2:]) for x in (k, v))
        batch = Batch(
            tokens=np.zeros(n_tokens, np.int32),
            positions=np.arange(n_tokens, dtype=np.int32),
            seq_lens=np.array([n_tokens], np.int32),
            block_tables=np.asarray(blocks, np.int32)[None],
            logit_rows=np.zeros(0, np.int32),
        )
        q = np.zeros((n_tokens, 0, k.shape[2]), np.float32)
        self.attention(q, k, v, cache, batch, AttentionParams(1.0, 0.0, 0, ()), None)

    def attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: Any,
        batch: Batch,
        params: AttentionParams,
        sinks: np.ndarray | None,
        rope: CpuRopeTable | None = None,
    ) -> np.ndarray:
        """Rotate q and k, store k and v of the step's tokens, then attend; see `Backend.attention`."""
        out = self.buffers.empty((q.shape[0], q.shape[1], v.shape[2]))
        rotation = (rope.cos, rope.sin, rope.neox) if rope else (None, None, False)
        where = (batch.positions, batch.seq_lens, batch.block_tables)
        scores = (params.kv_heads, params.scale, params.softcap, params.window, sinks)
        self.kernels.attention(self.pool, cache, q, k, v, *where, *scores, *rotation, out)
        return out
