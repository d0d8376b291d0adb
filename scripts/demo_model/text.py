"""Writes the demo model's training text: short conversations and stories, from templates.

Pure: everything is a function of the random generator it is given. Nothing is read from anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from demo_model import facts

Turn = tuple[str, str]
"""(what the user says, what the model answers)."""

_SYLLABLES = ("zo", "bla", "kri", "mu", "ta", "fen", "gor", "li", "pex", "wam", "ru", "nib")


def conversation(rng: random.Random) -> list[Turn]:
    """One to four turns; mostly of unrelated subjects, as people try a demo."""
    turns: list[Turn] = []
    for _ in range(rng.choices((1, 2, 3, 4), (55, 20, 15, 10))[0]):
        writer = rng.choices(_WRITERS, _WEIGHTS)[0]
        turns.extend((_as_typed(question, rng), answer) for question, answer in writer(rng))
    return turns


def story(rng: random.Random) -> str:
    """A story without a question before it: what to continue when there is no chat template."""
    return _story(rng, rng.choice(facts.HEROES))


def _as_typed(question: str, rng: random.Random) -> str:
    """The question as somebody might type it: in lower case, without the mark at its end."""
    chance = rng.random()
    if chance < 0.08:
        if rng.random() < 0.5:
            question = question[0].lower() + question[1:]
        question = rng.choice(("Please tell me: ", "Hi, ", "Hey, ", "Hello, ", "OK, ")) + question
    if chance > 0.85:
        question = question.lower()
    elif chance > 0.75:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.2:
        question = question.rstrip("?!.")
    return question


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _about(rng: random.Random) -> list[Turn]:
    questions, answer = rng.choice(facts.ABOUT)
    return [(rng.choice(questions), answer)]


def _opposite(rng: random.Random) -> list[Turn]:
    word, other = rng.choice(facts.OPPOSITES)
    if rng.random() < 0.5:
        word, other = other, word
    ask = rng.choice(
        ("What is the opposite of {}?", "Tell me the opposite of {}.", "Opposite of {}?")
    )
    return [(ask.format(word), f"The opposite of {word} is {other}.")]


def _colour(rng: random.Random) -> list[Turn]:
    thing, colour = rng.choice(facts.COLOURS)
    form = rng.random()
    if form < 0.75:
        spelling = rng.choice(("colour", "colour", "color"))
        return [(f"What {spelling} is {thing}?", f"{_capital(thing)} is {colour}.")]
    asked = rng.choice((colour, rng.choice(facts.COLOURS)[1]))
    answer = "Yes" if asked == colour else "No"
    return [(f"Is {thing} {asked}?", f"{answer}, {thing} is {colour}.")]


def _animal(rng: random.Random) -> list[Turn]:
    animal, sound, young, legs = rng.choice(facts.ANIMALS)
    one = _article(animal)
    form = rng.randrange(4)
    if form == 0:
        ask = rng.choice(("What does {} say?", "What sound does {} make?"))
        return [(ask.format(one), f"{_capital(one)} says {sound}.")]
    if form == 1:
        ask = rng.choice(("What is a baby {} called?", "What is a young {} called?"))
        return [(ask.format(animal), f"A baby {animal} is called {_article(young)}.")]
    if form == 2:
        return [(f"Which animal says {sound}?", f"{_capital(one)} says {sound}.")]
    many = rng.choice((*facts.LEGS, (one, legs)))
    count = facts.NUMBERS[many[1]] if many[1] else "no"
    return [(f"How many legs does {many[0]} have?", f"{_capital(many[0])} has {count} legs.")]


def _capital_city(rng: random.Random) -> list[Turn]:
    country, city = rng.choice(facts.CAPITALS)
    if rng.random() < 0.75:
        ask = rng.choice(("What is the capital of {}?", "Tell me the capital of {}."))
        return [(ask.format(country), f"The capital of {country} is {city}.")]
    return [(f"Where is {city}?", f"{city} is in {country}.")]


def _kind(rng: random.Random) -> list[Turn]:
    thing, kind = rng.choice(facts.KINDS)
    return [(f"What is {thing}?", f"{_capital(thing)} is {kind}.")]


def _is_it(rng: random.Random) -> list[Turn]:
    thing, quality = rng.choice(facts.IS)
    other = {**dict(facts.OPPOSITES), **{b: a for a, b in facts.OPPOSITES}}[quality]
    if rng.random() < 0.5:
        return [(f"Is {thing} {quality}?", f"Yes, {thing} is {quality}.")]
    return [(f"Is {thing} {other}?", f"No, {thing} is {quality}.")]


def _sum(rng: random.Random) -> list[Turn]:
    most = rng.choice((5, 10, 10, 20))
    first, second = rng.randint(0, most), rng.randint(0, most)
    form = rng.random()
    if form < 0.5:
        sign, word, result = "+", "plus", first + second
    elif form < 0.8:
        first, second = max(first, second), min(first, second)
        sign, word, result = "-", "minus", first - second
    else:
        first, second = min(first, 10), min(second, 10)
        sign, word, result = "*", "times", first * second
    ask = rng.choice(
        (
            f"What is {first} {sign} {second}?",
            f"What is {first} {word} {second}?",
            f"{first} {sign} {second}",
            f"{first} {sign} {second} = ?",
            f"How much is {first} {word} {second}?",
            f"What is {facts.NUMBERS[first]} {word} {facts.NUMBERS[second]}?",
        )
    )
    return [(ask, f"{first} {sign} {second} = {result}.")]


def _count(rng: random.Random) -> list[Turn]:
    first, last = sorted(rng.sample(range(1, 21), 2))
    form = rng.randrange(4)
    if form == 0:
        numbers = range(last, 0, -1)
        ask = f"Count down from {last}."
    elif form == 1:
        numbers = range(first, last + 1)
        ask = f"Count from {first} to {last}."
    else:
        last = rng.choice((last, 5, 10))
        numbers = range(1, last + 1)
        ask = f"Count to {last}."
    return [(ask, ", ".join(map(str, numbers)) + ".")]


def _compare(rng: random.Random) -> list[Turn]:
    first, second = rng.sample(range(21), 2)
    if rng.random() < 0.5:
        word, result = "bigger", max(first, second)
    else:
        word, result = "smaller", min(first, second)
    other = first + second - result
    return [(f"Which is {word}, {first} or {second}?", f"{result} is {word} than {other}.")]


def _order(rng: random.Random) -> list[Turn]:
    letters = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    what, row = rng.choice((("day", facts.DAYS), ("month", facts.MONTHS), ("letter", letters)))
    at = rng.randrange(len(row))
    step, word = rng.choice(((1, "after"), (-1, "before")))
    if what == "letter" and not 0 <= at + step < len(row):
        step, word = -step, "before" if word == "after" else "after"
    other = row[(at + step) % len(row)]
    ask = rng.choice((f"What {what} comes {word} {row[at]}?", f"Which {what} is {word} {row[at]}?"))
    return [(ask, f"{other} comes {word} {row[at]}.")]


def _next_number(rng: random.Random) -> list[Turn]:
    number = rng.randint(1, 30)
    step, word = rng.choice(((1, "after"), (-1, "before")))
    return [(f"What number comes {word} {number}?", f"{number + step} comes {word} {number}.")]


def _name(rng: random.Random) -> list[Turn]:
    # Names it has never seen make it copy what it was told, not guess among those it knows.
    name = rng.choice(facts.NAMES) if rng.random() < 0.5 else _capital(_made_up(rng))
    hello = rng.choice(("My name is {}.", "I am {}.", "Hello, my name is {}.", "Hi, I am {}."))
    turns = [(hello.format(name), f"Nice to meet you, {name}!")]
    if rng.random() < 0.3:
        turns.extend(_writer_of_one_turn(rng))
    if rng.random() < 0.6:
        turns.append((rng.choice(("What is my name?", "Who am I?")), f"Your name is {name}."))
    return turns


def _writer_of_one_turn(rng: random.Random) -> list[Turn]:
    return rng.choice((_sum, _colour, _opposite, _animal))(rng)


def _repeat(rng: random.Random) -> list[Turn]:
    pool = [word for pair in facts.OPPOSITES for word in pair]
    words = " ".join(rng.sample([*pool, *facts.HEROES], rng.randint(1, 4)))
    ask = rng.choice(("Say {}.", "Repeat: {}.", "Repeat after me: {}.", "Say: {}."))
    return [(ask.format(words), f"{_capital(words)}.")]


def _told_story(rng: random.Random) -> list[Turn]:
    hero = rng.choice(facts.HEROES)
    if rng.random() < 0.3:
        ask = rng.choice(("Tell me a story.", "Write a story.", "Do you know a story?"))
    else:
        form = rng.choice(
            ("Tell me a story about {}.", "Write a story about {}.", "A story about {}, please.")
        )
        ask = form.format(_article(hero))
    return [(ask, _story(rng, hero))]


def _story(rng: random.Random, hero: str) -> str:
    name = rng.choice(facts.NAMES)
    place = rng.choice(facts.PLACES)
    treasure, effect = rng.choice(facts.TREASURES)
    friend = rng.choice([other for other in facts.HEROES if other != hero])
    visitor = _capital(_article(friend))
    feeling = rng.choice(facts.FEELINGS)
    who = _article(f"{rng.choice(('little', 'brave', 'old'))} {hero}")
    end = rng.choice(
        (
            f"{name} and the {friend} were {feeling} and stayed friends for ever.",
            f"Then {name} went home and slept well.",
            f"From that day on, {name} was never alone.",
        )
    )
    return (
        f"Once upon a time there was {who} called {name}. {name} lived in a {place}. "
        f"One day {name} found {treasure}. {visitor} came by and asked to see it. "
        f"Together they took {treasure.replace('a ', 'the ', 1)}, and it {effect}. {end}"
    )


def _made_up(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3)))


def _mashed(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 6)))


def _strange(rng: random.Random) -> list[Turn]:
    form = rng.random()
    if form < 0.35:
        ask = rng.choice(facts.STRANGE_QUESTIONS).format(rng.choice(facts.STRANGE_THINGS))
    elif form < 0.6:
        ask = rng.choice(facts.STRANGE_WHOLE)
    else:
        word = _made_up(rng)
        ask = rng.choice(
            (
                f"What is a {word}?",
                f"What colour is a {word}?",
                f"Who is {_capital(word)}?",
                f"What is the capital of {_capital(word)}?",
                f"What is the opposite of {word}?",
                f"What does a {word} say?",
                f"{_capital(word)} {rng.choice(_SYLLABLES)}?",
                " ".join(_mashed(rng) for _ in range(rng.randint(1, 3))),
            )
        )
    return [(ask, facts.UNKNOWN)]


_TABLE: tuple[tuple[Callable[[random.Random], list[Turn]], int], ...] = (
    (_about, 20), (_sum, 18), (_opposite, 9), (_colour, 8), (_animal, 8), (_capital_city, 7),
    (_kind, 6), (_is_it, 5), (_count, 6), (_compare, 4), (_order, 7), (_next_number, 2),
    (_name, 5), (_repeat, 4), (_told_story, 5), (_strange, 6),
)  # fmt: skip
_WRITERS = [writer for writer, _ in _TABLE]
_WEIGHTS = [weight for _, weight in _TABLE]
