"""Regular expressions of JSON schemas (ECMA 262, its plain part) as grammar expressions. Pure.

What has no place in a grammar (looking around, back references, lazy repetition of any effect) is
refused. The text is that of a JSON string: quotes and backslashes in it are escaped.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.api.errors import ApiError, bad
from edgellm.api.gbnf import Grammar, in_class, literal, repeated

MAX_CHARACTERS = 1000
MAX_DEPTH = 32
_LAST = 0x10FFFF
_CLASSES = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x20, 0x20)],  # the others are control characters, which a JSON string must escape
}
_CONTROL = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_META = set("\\^$.|?*+()[]{}")
_PLAIN_ESCAPES = _META | set("/-\"'#&,:;<=>@_`~!% ")
_UNSAFE = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]
"""What does not stand for itself in a JSON string."""

Ranges = list[tuple[int, int]]


def pattern(text: object, grammar: Grammar) -> str:
    """An expression for the JSON strings, quotes included, that match. Raises ApiError 400."""
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        raise bad(f"a pattern is a text of at most {MAX_CHARACTERS} characters.")
    reader = _Reader(text)
    inner = reader.alternatives(0)
    if reader.at < len(text):
        raise reader.refused()
    body = " | ".join(_anchored(part, grammar) for part in inner)
    return f'"\\"" {grammar.rule(body)} "\\""'


@dataclass(frozen=True, slots=True)
class _Part:
    """One alternative: its items, and whether it is held at the beginning and the end."""

    items: tuple[str, ...]
    begins: bool
    ends: bool


def _anchored(part: _Part, grammar: Grammar) -> str:
    any_text = f"{grammar.built_in('char')}*"
    before = () if part.begins else (any_text,)
    after = () if part.ends else (any_text,)
    return " ".join((*before, *part.items, *after)) or '""'


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def refused(self) -> ApiError:
        return bad(f"the pattern {self.text[:80]!r} is not supported at character {self.at}.")

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        character = self._peek()
        if not character:
            raise self.refused()
        self.at += 1
        return character

    def alternatives(self, depth: int) -> list[_Part]:
        if depth > MAX_DEPTH:
            raise self.refused()
        parts = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            parts.append(self._sequence(depth))
        return parts

    def _sequence(self, depth: int) -> _Part:
        items: list[str] = []
        begins = ends = False
        while (character := self._peek()) and character not in "|)":
            if character == "^" and not items and not depth and not begins:
                self.at += 1
                begins = True
            elif character == "$" and not depth and self._ends_after():
                self.at += 1
                ends = True
            else:
                items.append(self._repeated(self._atom(depth)))
        return _Part(tuple(items), begins, ends)

    def _ends_after(self) -> bool:
        """Whether nothing follows the next character in its alternative."""
        return self.text[self.at + 1 : self.at + 2] in ("", "|")

    def _repeated(self, atom: str) -> str:
        character = self._peek()
        if character not in ("*", "+", "?", "{"):
            return atom
        self.at += 1
        if character == "{":
            low, high = self._counts()
        else:
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        if self._peek() == "?":  # lazy: what matches is the same
            self.at += 1
        elif self._peek() in ("*", "+", "{"):
            raise self.refused()
        if high is not None and high < low:
            raise self.refused()
        return '""' if high == 0 else repeated(atom, low, high)

    def _counts(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at : end].partition(",") if end > 0 else ("", "", "")
        if not low.isdecimal() or (high and not high.isdecimal()) or len(low + high) > 8:
            raise self.refused()
        self.at = end + 1
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None

    def _atom(self, depth: int) -> str:
        character = self._next()
        if character == "(":
            return self._group(depth)
        if character == "[":
            return self._bracket()
        if character == ".":
            return _written(_without([(0, _LAST)], [(10, 10), (13, 13)]))
        if character == "\\":
            return _written(self._escape())
        if character in _META:
            self.at -= 1
            raise self.refused()
        return literal(character) if character != '"' else _quoted('"')

    def _group(self, depth: int) -> str:
        if self._peek() == "?":
            if self.text[self.at : self.at + 2] != "?:":
                raise self.refused()
            self.at += 2
        parts = self.alternatives(depth + 1)
        if self._next() != ")":
            raise self.refused()
        written = [" ".join(part.items) or '""' for part in parts]
        return f"({' | '.join(written)})"

    def _escape(self) -> Ranges:
        """The characters that an escape stands for; after its backslash."""
        character = self._next()
        if character.lower() in _CLASSES:
            ranges = _CLASSES[character.lower()]
            return ranges if character.islower() else _without([(0, _LAST)], ranges)
        if character in _CONTROL:
            return [(_CONTROL[character], _CONTROL[character])]
        if character in ("x", "u"):
            digits = self.text[self.at : self.at + (2 if character == "x" else 4)]
            try:
                code = int(digits, 16)
            except ValueError:
                raise self.refused() from None
            self.at += len(digits)
            return [(code, code)]
        if character not in _PLAIN_ESCAPES:
            raise self.refused()
        return [(ord(character), ord(character))]

    def _bracket(self) -> str:
        negated = self._peek() == "^"
        self.at += negated
        ranges: Ranges = []
        while (character := self._next()) != "]":
            low = self._escape() if character == "\\" else [(ord(character), ord(character))]
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                end = self._next()
                high = self._escape() if end == "\\" else [(ord(end), ord(end))]
                if len(low) > 1 or len(high) > 1 or high[0][0] < low[0][0]:
                    raise self.refused()
                low = [(low[0][0], high[0][1])]
            ranges += low
        return _written(_without([(0, _LAST)], ranges) if negated else ranges)


def _without(ranges: Ranges, taken: Ranges) -> Ranges:
    for low, high in taken:
        left = [(a, min(b, low - 1)) for a, b in ranges if a < low]
        ranges = left + [(max(a, high + 1), b) for a, b in ranges if b > high]
    return ranges


def _written(ranges: Ranges) -> str:
    """One character of these, as a JSON string spells it."""
    plain = "".join(
        in_class(low) if low == high else f"{in_class(low)}-{in_class(high)}"
        for low, high in _without(ranges, _UNSAFE)
    )
    found = [f"[{plain}]"] if plain else []
    found += [_quoted(each) for each in '"\\' if _holds(ranges, ord(each))]
    found += [
        literal("\\" + name)
        for name, code in (("n", 10), ("r", 13), ("t", 9), ("f", 12), ("b", 8))
        if _holds(ranges, code)
    ]
    if not found:
        raise bad("a pattern asks for characters that no JSON string holds.")
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def _holds(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _quoted(character: str) -> str:
    return literal("\\" + character)
