"""Train the demo model from nothing: write stories, learn a tokenizer, train, export to GGUF, check the file.

python examples/train_demo/train.py --out mpillama/data/demo.gguf
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import gguf_file
import torch
from model import Config, Llama
from muon import Muon
from sample import generate
from stories import story
from tokenizer import END_OF_TEXT
from tokenizer import train as train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

DESCRIPTION = "A tiny model that tells simple stories for children, trained from scratch on synthetic text."
IGNORE = -100  # what cross_entropy leaves out
STORIES_FOR_TOKENIZER = 8000
HELD_OUT = 256  # the first seeds are for measuring, never for training
PACKED_EVERY = 8
COPYING_EVERY = 3


def batches(tokenizer: Tokenizer, size: int, n_ctx: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), each (rows, time), of stories that are never repeated.

    Usually a row is one story, next to others of about its length, so little is padding and attention stays short.
    Each PACKED_EVERY-th batch has rows of several stories instead, so that the whole context gets trained.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    shuffle = random.Random(seed)
    next_story = HELD_OUT + seed * 10_000_000
    per_row = 3
    while True:
        texts = [story(next_story + i) for i in range(size * 4 * PACKED_EVERY)]
        next_story += len(texts)
        rows = [[end, *encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
        packed = [rows.pop() for _ in range(size * 4)]
        rows.sort(key=len)
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        for i in range(0, len(packed) - size + 1, size):
            some = packed[i : i + size]
            joined = [some[j : j + per_row] for j in range(0, len(some), per_row)]
            groups.append([[token for row in rows for token in row[:-1]][: n_ctx + 1] for rows in joined])
        shuffle.shuffle(groups)
        for group in groups:
            longest = max(map(len, group))
            inputs = torch.tensor([row[:-1] + [end] * (longest - len(row)) for row in group])
            targets = torch.tensor([row[1:] + [IGNORE] * (longest - len(row)) for row in group])
            yield inputs, targets


def copying(n_vocab: int, rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of random tokens told twice; only the second telling counts.

    To keep a hero's name through a story, the model has to look back and copy. From stories alone it learns this late.
    """
    length = int(torch.randint(8, 64, (), generator=rng))
    once = torch.randint(n_vocab, (rows, length), generator=rng)
    twice = torch.cat((once, once), 1)
    targets = twice[:, 1:].clone()
    targets[:, : length - 1] = IGNORE
    return twice[:, :-1], targets


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


def rate(progress: float, warmup: float = 0.02) -> float:
    """The learning rate's factor at this share of the training: up, level, and down to zero over the last half."""
    return min(1.0, progress / warmup, (1.0 - progress) / 0.5)


def train(model: Llama, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Train in place, for --steps steps or --minutes minutes, whichever ends first."""
    matrices = [weight for name, weight in model.named_parameters() if name.startswith("blk.") and weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if not (name.startswith("blk.") and weight.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    random_tokens = torch.Generator().manual_seed(args.seed)
    start = time.monotonic()
    seen = 0
    for step, (inputs, targets) in enumerate(batches(tokenizer, args.batch, model.config.n_ctx, args.seed)):
        elapsed = time.monotonic() - start
        progress = max(step / args.steps, elapsed / (60 * args.minutes))
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(progress + 1e-3)
        # Only while the rate is high: the last half is for the stories alone.
        copies = progress < 0.5 and step % COPYING_EVERY == 1
        if copies:
            inputs, targets = copying(model.config.n_vocab, 2 * args.batch, random_tokens)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seen += int((targets != IGNORE).sum())
        if step % 20 <= copies:
            speed = seen / (time.monotonic() - start)
            what = "copying" if copies else "stories"
            print(f"step {step:5d}  {what} {loss.item():.3f}  {seen / 1e6:.2f}M tokens  {speed:.0f} tokens/s", flush=True)
    print(f"trained {step} steps, {seen / 1e6:.2f}M tokens, {(time.monotonic() - start) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop by then, with the schedule shortened to fit")
    parser.add_argument("--batch", type=int, default=16, help="stories per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few seconds of training, to try the pipeline")
    args = parser.parse_args()
    if args.quick:
        args.steps = min(args.steps, 8)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    config = Config()
    tokenizer = train_tokenizer((story(HELD_OUT + i) for i in range(STORIES_FOR_TOKENIZER)), config.n_vocab)
    model = Llama(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, args)
    model.eval()
    args.out.parent.mkdir(parents=True, exist_ok=True)
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
