"""Which tensors a model needs, with which shapes; fused ones are taken apart here, so that nobody else meets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpillama.config import Config
from mpillama.errors import ModelError
from mpillama.gguf.reader import GGUFHeader, TensorInfo
from mpillama.gguf.types import row_bytes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """A tensor that the model reads: its name, shape in GGUF order (in axis first), and whether it must be there."""

    name: str
    shape: Shape
    required: bool = True


def model_tensors(header: GGUFHeader, cfg: Config) -> dict[str, TensorInfo]:
    """Return the tensors that the model reads, by name, in the order of the file.

    Fused tensors (``attn_qkv``, a gate-and-up ``ffn_up``) appear as their members: a range of rows of a tensor is a
    tensor at a later offset. A tied head appears as ``output.weight`` with the place of ``token_embd.weight``.

    Raises:
        ModelError: a tensor is missing or has the wrong shape.
    """
    present = dict(header.tensors)
    for il in range(cfg.n_layer):
        _unfuse_qkv(present, f"blk.{il}.attn_qkv", cfg)
        if cfg.arch.fused_gate_up and not cfg.n_expert:
            _unfuse_gate_up(present, f"blk.{il}.ffn_up", cfg)
    if "output.weight" not in present and not cfg.arch.untied:
        present["output.weight"] = replace(present["token_embd.weight"], name="output.weight")

    found = {}
    for want in expected_tensors(cfg):
        info = present.get(want.name)
        if info is None:
            if want.required:
                raise ModelError(f"the model has no tensor {want.name}; the file is incomplete, convert it again")
        elif _squeezed(info.shape) != _squeezed(want.shape):
            raise ModelError(
                f"tensor {want.name} has shape {_text(info.shape)}; its metadata ask for {_text(want.shape)}"
            )
        else:
            found[want.name] = replace(info, shape=want.shape)
    return dict(sorted(found.items(), key=lambda item: (item[1].part, item[1].offset)))


def expected_tensors(cfg: Config) -> Iterator[Expected]:
    """Yield every tensor that a model of this configuration reads."""
    yield Expected("token_embd.weight", (cfg.n_embd, cfg.n_vocab))
    yield Expected("output_norm.weight", (cfg.n_embd,))
    yield Expected("output.weight", (cfg.n_embd, cfg.n_vocab))
    yield Expected("output.bias", (cfg.n_vocab,), required=False)
    for factors in {cfg.rope.factors, cfg.rope_window.factors} - {""}:
        yield Expected(factors, (cfg.rope.n_rot // 2,))
    for il in range(cfg.n_layer):
        for want in _attention(cfg):
            yield replace(want, name=f"blk.{il}.{want.name}")
        for want in _experts(cfg) if cfg.n_expert else _dense(cfg):
            yield replace(want, name=f"blk.{il}.{want.name}")


def _linear(name: str, n_in: int, n_out: int, scale: bool = True, bias: bool = True) -> Iterator[Expected]:
    yield Expected(f"{name}.weight", (n_in, n_out))
    if bias:
        yield Expected(f"{name}.bias", (n_out,), required=False)
    if scale:
        yield Expected(f"{name}.scale", (1,), required=False)


def _attention(cfg: Config) -> Iterator[Expected]:
    arch = cfg.arch
    n_q, n_k = cfg.n_head * cfg.n_embd_head_k, cfg.n_head_kv * cfg.n_embd_head_k
    if arch.pre_norms:
        yield Expected("attn_norm.weight", (cfg.n_embd,))
    yield from _linear("attn_q", cfg.n_embd, n_q)
    yield from _linear("attn_k", cfg.n_embd, n_k)
    yield from _linear("attn_v", cfg.n_embd, cfg.n_head_kv * cfg.n_embd_head_v)
    yield from _linear("attn_output", cfg.n_head * cfg.n_embd_head_v, cfg.n_embd)
    if arch.qk_norm:
        full = arch.qk_norm == "full"
        yield Expected("attn_q_norm.weight", (n_q if full else cfg.n_embd_head_k,))
        yield Expected("attn_k_norm.weight", (n_k if full else cfg.n_embd_head_k,))
    if arch.sinks:
        yield Expected("attn_sinks.weight", (cfg.n_head,))
    if arch.post_norms:
        yield Expected("post_attention_norm.weight", (cfg.n_embd,))
        yield Expected("post_ffw_norm.weight", (cfg.n_embd,))
    if arch.pre_norms:
        yield Expected(f"{arch.ffn_norm}.weight", (cfg.n_embd,))


def _dense(cfg: Config) -> Iterator[Expected]:
    scale = cfg.arch.ffn_scales
    yield from _linear("ffn_gate", cfg.n_embd, cfg.n_ff, scale)
    yield from _linear("ffn_up", cfg.n_embd, cfg.n_ff, scale)
    yield from _linear("ffn_down", cfg.n_ff, cfg.n_embd, scale)


def _experts(cfg: Config) -> Iterator[Expected]:
    arch, n = cfg.arch, cfg.n_expert
    yield from _linear("ffn_gate_inp", cfg.n_embd, n, scale=False)
    for name, n_in, n_out in (
        ("ffn_gate_exps", cfg.n_embd, cfg.n_ff_exp),
        ("ffn_up_exps", cfg.n_embd, cfg.n_ff_exp),
        ("ffn_down_exps", cfg.n_ff_exp, cfg.n_embd),
    ):
        yield Expected(f"{name}.weight", (n_in, n_out, n))
        yield Expected(f"{name}.bias", (n_out, n), required=False)
        if arch.expert_scales:
            yield Expected(f"{name}.scale", (n,), required=False)
    if cfg.n_ff_shexp:
        yield from _linear("ffn_gate_shexp", cfg.n_embd, cfg.n_ff_shexp, scale=False, bias=False)
        yield from _linear("ffn_up_shexp", cfg.n_embd, cfg.n_ff_shexp, scale=False, bias=False)
        yield from _linear("ffn_down_shexp", cfg.n_ff_shexp, cfg.n_embd, scale=False, bias=False)
        if arch.shared_experts == "gated":
            yield Expected("ffn_gate_inp_shexp.weight", (cfg.n_embd, 1))


def _unfuse_qkv(present: dict[str, TensorInfo], name: str, cfg: Config) -> None:
    n_k = cfg.n_head_kv * cfg.n_embd_head_k
    members = (
        ("attn_q", cfg.n_head * cfg.n_embd_head_k),
        ("attn_k", n_k),
        ("attn_v", cfg.n_head_kv * cfg.n_embd_head_v),
    )
    _unfuse(present, name, members)
    scale = present.pop(f"{name}.scale", None)
    if scale is not None:
        for member, _ in members:
            present.setdefault(_sibling(name, member) + ".scale", scale)


def _unfuse_gate_up(present: dict[str, TensorInfo], name: str, cfg: Config) -> None:
    _unfuse(present, name, (("ffn_gate", cfg.n_ff), ("ffn_up", cfg.n_ff)))


def _unfuse(present: dict[str, TensorInfo], name: str, members: tuple[tuple[str, int], ...]) -> None:
    """Replace ``name`` by its members, each a number of its rows (for a bias: of its elements), in their order."""
    for suffix in (".weight", ".bias"):
        fused = present.get(name + suffix)
        if fused is None:
            continue
        n_rows = sum(n for _, n in members)
        if fused.shape[-1] != n_rows or len(fused.shape) != (2 if suffix == ".weight" else 1):
            raise ModelError(f"tensor {fused.name} has shape {_text(fused.shape)}; its metadata ask for {n_rows} rows")
        if suffix == ".bias" and fused.type.block_size > 1:
            raise ModelError(f"tensor {fused.name} has type {fused.type.name}; a fused bias must be F32, F16 or BF16")
        del present[name + suffix]
        start = 0
        for member, n in members:
            head = fused.shape[:-1]
            stride = row_bytes(fused.type, head[0]) if head else row_bytes(fused.type, 1)
            part = replace(
                fused, name=_sibling(name, member) + suffix, shape=(*head, n), offset=fused.offset + start * stride
            )
            present[part.name] = part
            start += n


def _sibling(name: str, member: str) -> str:
    return f"{name.rpartition('.')[0]}.{member}"


def _squeezed(shape: Shape) -> Shape:
    """Drop trailing axes of one element, which GGUF may or may not write."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
