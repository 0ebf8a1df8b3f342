"""Train the demo model from nothing: write stories, learn a tokenizer, train, export to GGUF, check the file.

python examples/train_demo/train.py --out mpillama/data/demo.gguf
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

import gguf_file
from model import Config, Llama
from muon import Muon
from sample import generate
from stories import sketch, story
from tokenizer import END_OF_TEXT
from tokenizer import train as train_tokenizer

DESCRIPTION = "A tiny model that tells simple stories for children, trained from scratch on synthetic text."
IGNORE = -100  # what cross_entropy leaves out
STORIES_FOR_TOKENIZER = 8000
SEEDS = 10_000_000  # seeds of stories for each seed of a training
HELD_OUT = 256  # the first seeds are for measuring, never for training
PACKED_EVERY = 8
WARMUP, LEVEL = 0.02, 0.55  # shares of the training at which the learning rate is up, and starts to go down
ONLY_SKETCHES = 0.25  # share of the training
SKETCHES_EVERY = 5  # after that, until the rate goes down
SAVE_EVERY = 100  # steps


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens as (inputs, targets), each (rows, time)."""
    longest = max(map(len, rows))
    inputs = torch.tensor([row[:-1] + [pad] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [IGNORE] * (longest - len(row)) for row in rows])
    return inputs, targets


def sketches(tokenizer: Tokenizer, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of short texts full of names.

    To keep a hero's name through a story, the model has to look back and copy. From whole stories alone it learns this
    many times more slowly: there are few names in them, and far apart.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    for first in itertools.count(seed * SEEDS, size):
        texts = [sketch(first + i) for i in range(size)]
        yield padded([[end, *encoding.ids, end] for encoding in tokenizer.encode_batch(texts)], end)


def batches(tokenizer: Tokenizer, size: int, n_ctx: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of stories that are never repeated.

    Usually a row is one story, next to others of about its length, so little is padding and attention stays short.
    Each PACKED_EVERY-th batch has rows of several stories instead, so that the whole context gets trained.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    shuffle = random.Random(seed)
    pool = size * 4 * PACKED_EVERY
    per_row = 3
    for first in itertools.count(HELD_OUT + seed * SEEDS, pool):
        texts = [story(first + i) for i in range(pool)]
        rows = [[end, *encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
        packed = [rows.pop() for _ in range(size * 4)]
        rows.sort(key=len)
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        for i in range(0, len(packed), size):
            some = packed[i : i + size]
            joined = [some[j : j + per_row] for j in range(0, len(some), per_row)]
            groups.append([[token for row in rows for token in row[:-1]][: n_ctx + 1] for rows in joined])
        shuffle.shuffle(groups)
        for group in groups:
            yield padded(group, end)


def loss_of(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy per token, in nats."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def held_out_loss(model: Llama, tokenizer: Tokenizer, stories: int) -> float:
    """Nats per token over stories that are not trained on."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    total, count = 0.0, 0
    for seed in range(stories):
        row = torch.tensor([[end, *tokenizer.encode(story(seed)).ids, end]])
        total += float(loss_of(model, row[:, :-1], row[:, 1:])) * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count


def rate(progress: float) -> float:
    """The learning rate's factor at this share of the training: up, level, and down to zero."""
    return min(1.0, progress / WARMUP, (1.0 - progress) / (1.0 - LEVEL))


def train(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Train in place, for --steps steps or --minutes minutes, whichever ends first."""
    matrices = [weight for name, weight in model.named_parameters() if name.startswith("blk.") and weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if not (name.startswith("blk.") and weight.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start = time.monotonic()
    seen = 0
    only_sketches, some_sketches = (0.0, 0.0) if args.init else (ONLY_SKETCHES, LEVEL)
    short = sketches(tokenizer, args.batch, args.seed)
    long = batches(tokenizer, args.batch, model.config.n_ctx, args.seed)
    for step in itertools.count():
        progress = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        if progress >= 1:
            break
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate(progress + 1e-3)
        is_sketch = progress < only_sketches or (progress < some_sketches and step % SKETCHES_EVERY == 1)
        inputs, targets = next(short if is_sketch else long)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += int((targets != IGNORE).sum())
        if step % 20 == 0:
            done = f"{seen / 1e6:.2f}M tokens, {(time.monotonic() - start) / 60:.1f} minutes"
            print(f"step {step:5d}  {'sketches' if is_sketch else 'stories'} {loss.item():.3f}  {done}", flush=True)
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            gguf_file.write(args.out, model, tokenizer, DESCRIPTION)
    print(f"trained {step} steps, {seen / 1e6:.2f}M tokens, {(time.monotonic() - start) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--init", type=Path, help="go on with the weights and the tokenizer of this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000, help="0 trains nothing, and only exports again")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop by then, with the schedule shortened to fit")
    parser.add_argument("--batch", type=int, default=16, help="stories per step")
    parser.add_argument("--lr", type=float, default=6e-3, help="of the matrices (Muon)")
    parser.add_argument("--embedding-lr", type=float, default=1e-2, help="of embeddings and norms (AdamW)")
    parser.add_argument("--sharpen", type=float, default=1.0, help="a factor of all logits, in the file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few seconds of training, to try the pipeline")
    args = parser.parse_args()
    if args.quick:
        args.steps = min(args.steps, 8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    if args.init:
        model, tokenizer = gguf_file.read(args.init)
        model.train()
    else:
        config = Config()
        tokenizer = train_tokenizer((story(HELD_OUT + i) for i in range(STORIES_FOR_TOKENIZER)), config.n_vocab)
        model = Llama(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if args.steps:
        train(model, tokenizer, args)
    model.eval()
    # Logits times s sample like temperature 1/s: less of the few percent that a small model gives to wrong words.
    model.output_norm.weight.data *= args.sharpen
    gguf_file.write(args.out, model, tokenizer, DESCRIPTION)

    again, again_tokenizer = gguf_file.read(args.out)
    measured = 8 if args.quick else HELD_OUT
    before, after = (held_out_loss(m, tokenizer, measured) for m in (model, again))
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.2f} MB; held-out loss {before:.4f} as trained, {after:.4f} from the file")
    for prompt in () if args.quick else ("Once upon a time", "One day", "There was", "Lily", ""):
        as_trained = generate(model, tokenizer, prompt)[0]
        from_file = generate(again, again_tokenizer, prompt)[0]
        verdict = "the same" if as_trained == from_file else "something else"
        print(f"--- greedy {prompt!r}: the file says {verdict}\n{from_file}\n")


if __name__ == "__main__":
    main()
