"""Numbers within bounds, as grammar expressions. Pure.

JSON numbers are written in decimal without leading zeros, so a bound is a statement about digits.
What an expression admits is within the bounds; of numbers with very many digits not all are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from edgellm.api.errors import bad
from edgellm.api.gbnf import choice, literal

MAX_DIGITS = 16
_LIMIT = 10**MAX_DIGITS


@dataclass(frozen=True, slots=True)
class Bounds:
    """None: no bound."""

    low: Decimal | None = None
    high: Decimal | None = None
    above: bool = False
    """``low`` itself is not within."""
    below: bool = False


def integers(bounds: Bounds) -> str:
    """An expression for the whole numbers within. Raises ApiError where there is none."""
    low = None if bounds.low is None else _ceiling(bounds.low, bounds.above)
    high = None if bounds.high is None else -_ceiling(-bounds.high, bounds.below)
    if (low is not None and abs(low) >= _LIMIT) or (high is not None and abs(high) >= _LIMIT):
        raise bad(f"bounds of a number of more than {MAX_DIGITS} digits are not supported.")
    if low is not None and high is not None and low > high:
        raise bad(f"no whole number is within {low} and {high}.")
    found = []
    if low is None or low < 0:  # the negative ones, by their absolute values
        least = 1 if high is None or high >= 0 else -high
        found += [f'"-" {part}' for part in _whole(least, None if low is None else -low)]
    if high is None or high >= 0:
        found += _whole(0 if low is None or low < 0 else low, high)
    return choice(found)


def _ceiling(value: Decimal, strictly: bool) -> int:
    floor = int(value.to_integral_value(ROUND_FLOOR))
    return floor + 1 if strictly or value != floor else floor


def _whole(low: int, high: int | None) -> list[str]:
    """Expressions for ``low`` (from 0 on) to ``high``."""
    found = []
    if low == 0:
        found.append('"0"')
        low = 1
        if high == 0:
            return found
    length = len(str(low))
    last = length if high is None else len(str(high))
    for digits in range(length, last + 1):
        least = max(low, 10 ** (digits - 1))
        most = 10**digits - 1 if high is None else min(high, 10**digits - 1)
        found += _same_length(str(least), str(most))
    if high is None and length < MAX_DIGITS:
        found.append(f"[1-9] [0-9]{{{length},{MAX_DIGITS - 1}}}")
    return found


def _digits(low: int, high: int) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _any(count: int) -> str:
    return f"[0-9]{{{count}}}" if count > 1 else "[0-9]" if count else ""


def _same_length(low: str, high: str) -> list[str]:
    """Numbers of as many digits as both bounds have."""
    if low == high:
        return [literal(low)]
    rest = len(low) - 1
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return [f"{_digits(int(low[0]), int(high[0]))} {_any(rest)}".strip()]
    if low[0] == high[0]:
        return [f"{literal(low[0])} {part}" for part in _same_length(low[1:], high[1:])]
    found = [f"{literal(low[0])} {part}" for part in _same_length(low[1:], "9" * rest)]
    if int(high[0]) - int(low[0]) > 1:
        found.append(f"{_digits(int(low[0]) + 1, int(high[0]) - 1)} {_any(rest)}".strip())
    found += [f"{literal(high[0])} {part}" for part in _same_length("0" * rest, high[1:])]
    return found


# --- numbers with a fraction ------------------------------------------------------------


def decimals(bounds: Bounds) -> str:
    """An expression for the numbers within, written without an exponent. Raises ApiError where
    there is none."""
    low, high = bounds.low, bounds.high
    for bound in (low, high):
        if bound is not None and (abs(bound) >= _LIMIT or _places(bound) > MAX_DIGITS):
            raise bad(f"bounds of a number of more than {MAX_DIGITS} digits are not supported.")
    found: list[str] = []
    zero = Decimal(0)
    if low is None or low < zero:
        least, above = (zero, False) if high is None or high >= zero else (-high, bounds.below)
        most = None if low is None else -low
        found += [f'"-" {part}' for part in _positive(least, most, above, bounds.above)]
    if high is None or high >= zero:
        least, above = (zero, False) if low is None or low < zero else (low, bounds.above)
        found += list(_positive(least, high, above, bounds.below))
    if not found:
        raise bad(f"no number is within {low} and {high}.")
    return choice(found)


def _places(value: Decimal) -> int:
    exponent = value.as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _parts(value: Decimal) -> tuple[int, str]:
    """The whole part, and the digits of the fraction without zeros at the end."""
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _positive(low: Decimal, high: Decimal | None, above: bool, below: bool) -> Iterator[str]:
    """From ``low`` (0 or more) on."""
    first, begin = _parts(low)
    if high is None:
        yield from _with(first, _fraction(begin, None, above, False))
        yield from (f'{part} ("." [0-9]{{1,{MAX_DIGITS}}})?' for part in _whole(first + 1, None))
        return
    if low > high or (low == high and (above or below)):
        return
    last, end = _parts(high)
    if first == last:
        yield from _with(first, _fraction(begin, end, above, below))
        return
    yield from _with(first, _fraction(begin, None, above, False))
    if last - first > 1:
        between = _whole(first + 1, last - 1)
        yield from (f'{part} ("." [0-9]{{1,{MAX_DIGITS}}})?' for part in between)
    yield from _with(last, _fraction("", end, False, below))


def _with(whole: int, fractions: list[str]) -> Iterator[str]:
    """The alternatives of one whole part; an empty fraction is no fraction."""
    written = [part for part in fractions if part]
    optional = "?" if len(written) < len(fractions) else ""
    if written:
        yield f'{literal(str(whole))} ("." {choice(written)}){optional}'
    elif fractions:
        yield literal(str(whole))


def _fraction(low: str, high: str | None, above: bool, below: bool) -> list[str]:
    """Digits after the point from ``low`` to ``high`` (None: below 1); an empty one among them
    says that there need not be any."""
    found = [""] if not low and not above and (high is None or high or not below) else []
    return found + _digits_between(low, high, above, below, MAX_DIGITS)


def _digits_between(low: str, high: str | None, above: bool, below: bool, room: int) -> list[str]:
    """Non-empty runs of digits in these bounds. ``low`` "" is all zeros; with ``above`` one digit
    must then be more."""
    if not room:
        return []
    if high is None and not low and not above:
        return [f"[0-9]{{1,{room}}}"]
    if high == "":  # nothing but zeros is left, and only where the bound itself is within
        return [] if low or above or below else [f'"0"{{1,{room}}}']
    least = int(low[0]) if low else 0
    most = int(high[0]) if high else 9
    if least > most:
        return []
    found = []
    for digit in sorted({least, most}):
        below_here = high is not None and digit == most
        rest_low = low[1:] if digit == least else ""
        rest_above = above and digit == least
        rest_high = high[1:] if below_here and high is not None else None
        rest_below = below and below_here
        ends = not rest_low and not rest_above and (rest_high is None or rest_high or not below)
        more = _digits_between(rest_low, rest_high, rest_above, rest_below, room - 1)
        if more:
            found.append(f"{literal(str(digit))} ({' | '.join(more)}){'?' if ends else ''}")
        elif ends:
            found.append(literal(str(digit)))
    if most - least > 1:
        found.append(f"{_digits(least + 1, most - 1)} [0-9]{{0,{room - 1}}}")
    return found
