"""Let the model tell stories, with plain PyTorch: what the trained model says before mpillama enters the picture.

python examples/train_demo/sample.py mpillama/data/demo.gguf --prompt "Once upon a time" --temp 0.8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model import Llama
from tokenizer import END_OF_TEXT


def filtered(logits: torch.Tensor, temp: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The probabilities that are left of one row of logits, in the order top-k, top-p, min-p, temperature."""
    values, order = logits.topk(top_k)
    p = values.softmax(-1)
    keep = (p.cumsum(-1) - p < top_p) & (p >= min_p * p[0])
    p = torch.where(keep, values / temp, -torch.inf).softmax(-1)
    return torch.zeros_like(logits).scatter(-1, order, p)


@torch.no_grad()
def generate(
    model: Llama, tokenizer: Tokenizer, prompt: str, temp: float = 0.0, seed: int = 0,
    top_k: int = 40, top_p: float = 0.95, min_p: float = 0.05,
) -> tuple[str, bool]:  # fmt: skip
    """The prompt continued up to the end of the story (then True) or of the context (False); temp 0 is greedy."""
    random = torch.Generator().manual_seed(seed)
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    while len(ids) < model.config.n_ctx:
        logits = model(torch.tensor([ids]))[0, -1]
        if temp == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(filtered(logits, temp, top_k, top_p, min_p), 1, generator=random))
        if token == end:
            return tokenizer.decode(ids[1:]), True
        ids.append(token)
    return tokenizer.decode(ids[1:]), False


def main() -> None:
    import gguf_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", action="append", help="may be given more than once")
    parser.add_argument("--temp", type=float, default=0.0, help="0 is greedy (the default)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = gguf_file.read(args.file)
    for prompt in args.prompt or ["Once upon a time"]:
        text, ended = generate(model, tokenizer, prompt, args.temp, args.seed)
        print(f"--- {prompt!r}, temp {args.temp}, seed {args.seed}{'' if ended else ' (no end of text)'}\n{text}\n")


if __name__ == "__main__":
    main()
