"""Trains the demo model from nothing: writes the text, learns a vocabulary, trains, exports.

    pip install -e '.[train]' && python scripts/train_demo_model.py --out models/edgellm-demo.gguf

One thread, no accelerator. The text and the vocabulary are functions of the seed and equal
everywhere; the weights also depend on the processor's order of sums, so a second run gives an
equally good model, not the same bytes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional

from demo_model import export, text, vocabulary
from demo_model.network import Llama, Shape
from demo_model.vocabulary import ASSISTANT, BEGIN, END, USER, Vocabulary

QUESTION_WEIGHT = 0.05
"""Of a question's tokens in the loss: what people ask is mostly chance, what to answer is not."""

Row = tuple[list[int], list[float]]
"""(token ids, weight of each in the loss), one longer than the positions trained on."""


def documents(rng: random.Random, words: Vocabulary) -> Iterator[Row]:
    """Without end: conversations as the chat template writes them; now and then a bare story."""
    while True:
        ids, weights = [BEGIN], [0.0]
        if rng.random() < 0.03:
            story = [*words.encode(text.story(rng)), END]
            ids += story
            weights += [0.3] * len(story)
        else:
            for question, answer in text.conversation(rng):
                asked = [USER, *words.encode(question), END, ASSISTANT]
                answered = [*words.encode(answer), END]
                ids += asked + answered
                weights += [QUESTION_WEIGHT] * len(asked) + [1.0] * len(answered)
        yield ids, weights


def rows(rng: random.Random, words: Vocabulary, length: int) -> Iterator[Row]:
    """Documents laid end to end and cut to ``length + 1``; each row starts with a new one."""
    ids: list[int] = []
    weights: list[float] = []
    for document in documents(rng, words):
        ids += document[0]
        weights += document[1]
        if len(ids) > length:
            yield ids[: length + 1], weights[: length + 1]
            ids, weights = [], []


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: up over the first fiftieth, then down along a cosine."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def answer(model: Llama, words: Vocabulary, question: str, most: int = 60) -> str:
    """The model's greedy answer, computed the slow way; for the eye while training."""
    ids = [BEGIN, USER, *words.encode(question), END, ASSISTANT]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < most:
            token = int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax())
            if token == END:
                break
            ids.append(token)
    return words.decode(ids[start:])


def train(arguments: argparse.Namespace) -> None:
    """The whole run; prints a line every hundred steps and a few answers every tenth of it."""
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    sample = [part for _ in range(20000) for turn in text.conversation(rng) for part in turn]
    words = vocabulary.learn(
        [*sample, *(text.story(rng) for _ in range(300))], arguments.vocabulary
    )
    model = Llama(Shape(vocabulary=len(words)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(words)} tokens, {parameters} parameters", flush=True)

    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    # The last tenth sees rows as long as the context, so that a long chat stays sensible.
    short, long = arguments.length, model.shape.context
    started, seen, mean = time.monotonic(), 0, 0.0
    short_rows, long_rows = rows(rng, words, short), rows(rng, words, long)
    for step in range(arguments.steps):
        in_long = step >= arguments.steps * 0.9
        source, count = (
            (long_rows, arguments.tokens // long)
            if in_long
            else (short_rows, arguments.tokens // short)
        )
        batch = [next(source) for _ in range(count)]
        ids = torch.tensor([row[0] for row in batch])
        weights = torch.tensor([row[1] for row in batch])[:, 1:].reshape(-1)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, arguments.steps, arguments.rate)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            hidden = model(ids[:, :-1]).reshape(-1, model.shape.width)
            logits = model.logits(hidden)
        losses = functional.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += ids.numel()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 99:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}: loss {mean:.4f}, {seen} tokens, {elapsed:.0f} s", flush=True)
        if (step + 1) % max(1, arguments.steps // 10) == 0:
            for question in ("What is edgellm?", "What is 7 + 6?", "What is the opposite of hot?"):
                print(f"  {question} {answer(model, words, question)}", flush=True)
            export.write(arguments.out, model, words)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the GGUF to write")
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--tokens", type=int, default=2048, help="trained on in one step")
    parser.add_argument(
        "--length", type=int, default=128, help="tokens in a row, for most of the run"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="multiply in bfloat16: several times faster where the processor has it",
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
