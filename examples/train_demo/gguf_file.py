"""Write the trained model as a GGUF file in Q8_0, and read such a file back."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer

from model import Config, Llama
from tokenizer import END_OF_TEXT, from_tokens, tokens_and_merges

ARCH = "llama"


def write(path: Path, model: Llama, tokenizer: Tokenizer, description: str) -> None:
    """Write model and tokenizer; matrices as Q8_0, norms as F32. The head is tied, so there is no output.weight."""
    config = model.config
    writer = gguf.GGUFWriter(path, ARCH)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("mpillama demo")
    writer.add_description(description)
    writer.add_license("MIT")
    writer.add_languages(["en"])
    writer.add_size_label(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.n_vocab)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_block)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_freq_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)

    tokens, merges = tokens_and_merges(tokenizer)
    end = tokens.index(END_OF_TEXT)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t == END_OF_TEXT else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)

    for name, weight in model.state_dict().items():
        array = weight.detach().float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> tuple[Llama, Tokenizer]:
    """The model of a file that `write` made, with its weights dequantized, and the tokenizer."""
    reader = gguf.GGUFReader(path)

    def field(key: str) -> object:
        return reader.fields[key].contents()

    config = Config(
        n_vocab=int(field(f"{ARCH}.vocab_size")),
        n_ctx=int(field(f"{ARCH}.context_length")),
        n_embd=int(field(f"{ARCH}.embedding_length")),
        n_block=int(field(f"{ARCH}.block_count")),
        n_head=int(field(f"{ARCH}.attention.head_count")),
        head_dim=int(field(f"{ARCH}.attention.key_length")),
        n_ff=int(field(f"{ARCH}.feed_forward_length")),
        rope_freq_base=float(field(f"{ARCH}.rope.freq_base")),
        norm_eps=float(field(f"{ARCH}.attention.layer_norm_rms_epsilon")),
    )
    model = Llama(config)
    weights = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    model.load_state_dict(weights)
    tokenizer = from_tokens(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"))
    return model.eval(), tokenizer
