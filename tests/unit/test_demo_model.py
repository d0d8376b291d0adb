"""The bundled model: small, well formed, and right about its own kind of question.

The answers come from llama.cpp alone, with nothing of edgellm between: what is tested is the file.
The text it was trained on and its vocabulary are tested without torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest

from demo_model import facts, text
from demo_model.vocabulary import FIRST_BYTE, FIRST_PIECE, Vocabulary, learn

llama_cpp = pytest.importorskip("llama_cpp", reason="the engine is not installed")

QUESTIONS = (
    ("What is edgellm?", "devices"),
    ("Hello!", "Hello"),
    ("What is 3 + 4?", "= 7."),
    ("What is 12 - 5?", "= 7."),
    ("What is the opposite of hot?", "cold"),
    ("What colour is the sky?", "blue"),
    ("Count to 5.", "1, 2, 3, 4, 5."),
    ("What does a cow say?", "moo"),
    ("What is the capital of France?", "Paris"),
    ("What day comes after Monday?", "Tuesday"),
    ("Is ice hot?", "No"),
    ("How many legs does a spider have?", "eight"),
    ("Who won the game?", "do not know"),
)
"""(question, what the greedy answer must contain)."""


@pytest.fixture(scope="module")
def header(demo_model: Path) -> gguf.GGUFReader:
    """The file as the reference reader sees it."""
    return gguf.GGUFReader(demo_model)


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Iterator[Any]:
    """The model in llama.cpp, one thread."""
    loaded = llama_cpp.Llama(
        str(demo_model), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def vocabulary(header: gguf.GGUFReader) -> Vocabulary:
    """Our encoder with the tokens of the file."""
    tokens = header.fields["tokenizer.ggml.tokens"].contents()
    return Vocabulary(tokens[FIRST_PIECE:])


def ask(model: Any, *messages: str) -> tuple[str, str]:
    """The greedy answer to the last message (user and model by turns), and why it ended."""
    roles = ("user", "assistant")
    turns = [{"role": roles[at % 2], "content": said} for at, said in enumerate(messages)]
    choice = model.create_chat_completion(turns, temperature=0, max_tokens=120)["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_is_at_most_four_megabytes(demo_model: Path) -> None:
    assert demo_model.stat().st_size <= 4_000_000


def test_has_the_shape_that_splitting_and_quantised_kv_need(header: gguf.GGUFReader) -> None:
    def value(key: str) -> Any:
        return header.fields[key].contents()

    assert value("general.architecture") == "llama"
    assert value("llama.block_count") >= 6
    assert value("llama.attention.key_length") % 32 == 0, "q8_0 KV cells are blocks of 32"
    assert value("llama.attention.head_count") > value("llama.attention.head_count_kv")
    assert value("general.license") == "MIT"


def test_chat_template_says_where_turns_begin_and_end(header: gguf.GGUFReader) -> None:
    import jinja2.sandbox

    template = header.fields["tokenizer.chat_template"].contents()
    rendered = (
        jinja2.sandbox.ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(
            bos_token="<s>",
            eos_token="</s>",
            add_generation_prompt=True,
            messages=[
                {"role": "user", "content": " Hi! "},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "Bye!"},
            ],
        )
    )
    assert rendered == "<s><|user|>Hi!</s><|assistant|>Hello!</s><|user|>Bye!</s><|assistant|>"


@pytest.mark.parametrize(("question", "right"), QUESTIONS)
def test_answers_its_own_kind_of_question(model: Any, question: str, right: str) -> None:
    answer, reason = ask(model, question)
    assert right in answer
    assert reason == "stop", "it must end by itself"
    assert answer == answer.strip(), "no space before the first word"


def test_tells_a_story_about_what_was_asked(model: Any) -> None:
    answer, _ = ask(model, "Tell me a story about a fox.")
    assert answer.startswith("Once upon a time")
    assert "fox" in answer


def test_remembers_what_was_said_before(model: Any) -> None:
    hello = "My name is Anna."
    first, _ = ask(model, hello)
    assert "Anna" in first
    answer, _ = ask(model, hello, first, "What is my name?")
    assert "Anna" in answer


def test_does_most_small_sums(model: Any) -> None:
    """Sums were all in the text, so this measures how well it learnt, not whether it can add."""
    sums = [(a, b) for a in range(0, 11, 2) for b in range(1, 11, 3)]
    right = sum(f"= {a + b}." in ask(model, f"What is {a} + {b}?")[0] for a, b in sums)
    assert right >= 0.9 * len(sums)


def test_our_encoder_cuts_text_as_llama_cpp_does(model: Any, vocabulary: Vocabulary) -> None:
    rng = random.Random(5)
    samples = [part for _ in range(200) for turn in text.conversation(rng) for part in turn]
    for sample in [*samples, "Grüße, 世界!", "two  spaces", "tab\tand\nline", "7 x 8 = 56", " "]:
        theirs = model.tokenize(sample.encode(), add_bos=False, special=False)
        assert vocabulary.encode(sample) == theirs, sample


def test_what_it_was_taught_needs_no_byte_tokens(vocabulary: Vocabulary) -> None:
    rng = random.Random(6)
    for _ in range(300):
        for question, answer in text.conversation(rng):
            ids = vocabulary.encode(question) + vocabulary.encode(answer)
            assert all(i >= FIRST_PIECE for i in ids)
            assert vocabulary.decode(vocabulary.encode(answer)) == answer


def test_text_is_a_function_of_the_seed() -> None:
    def written(seed: int) -> list[list[text.Turn]]:
        rng = random.Random(seed)
        return [text.conversation(rng) for _ in range(50)]

    assert written(1) == written(1)
    assert written(1) != written(2)


def test_every_sum_in_the_text_is_right() -> None:
    rng = random.Random(7)
    sums = 0
    for turn in (turn for _ in range(3000) for turn in text.conversation(rng)):
        left, equals, result = turn[1].removesuffix(".").partition(" = ")
        if not equals:
            continue
        first, sign, second = left.split()
        a, b = int(first), int(second)
        assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]
        sums += 1
    assert sums > 300


def test_no_word_has_two_opposites() -> None:
    words = [word for pair in facts.OPPOSITES for word in pair]
    assert len(words) == len(set(words))


def test_learning_a_vocabulary_joins_frequent_letters_but_no_digits_or_marks() -> None:
    words = learn(["the cat and the hat, 11 11 11"] * 3, FIRST_PIECE + 30)
    assert "\u2581the" in words.pieces
    joined = [piece for piece in words.pieces if len(piece) > 1]
    assert all(piece.removeprefix("\u2581").isalpha() for piece in joined)
    assert words.decode(words.encode("the hat, 1")) == "the hat, 1"
    first_bytes = islice(words.encode("é"), 2)
    assert [i - FIRST_BYTE for i in first_bytes] == list("é".encode())
