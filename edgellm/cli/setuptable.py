"""What set-ups were predicted to take and what they took, for people. Pure: text out."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.bench.setups import ANSWER, MEMORY_WITHIN, RUNS, WITHIN, Outcome, Times


def setups_table(outcomes: Sequence[Outcome]) -> str:
    """A line a set-up, and how many were predicted well."""
    lines = [
        f"Predicted and measured, milliseconds; {ANSWER} tokens of answer, medians of {RUNS}.",
        f"{'set-up':<12} {'layers':<16} {'TTFT':>15} {'':>6} {'TPOT':>13} {'':>6} {'memory':>7}",
    ]
    for one in outcomes:
        ttft, tpot = one.errors
        told, was = one.predicted, one.measured
        layers = " ".join(f"{s.device}{s.layers[0]}-{s.layers[1] - 1}" for s in one.stages)
        lines.append(
            f"{one.setup.name:<12} {layers:<16}"
            f" {_ms(told.ttft_s):>7}{_ms(was.ttft_s):>8} {ttft:>+6.0%}"
            f" {_ms(told.tpot_s):>6}{_ms(was.tpot_s):>7} {tpot:>+6.0%}"
            f" {one.memory_error:>+7.0%}"
            f"  {'' if one.met else 'MISSED'}"
        )
        if one.alone is not None:
            lines.append(f"{'':<12} alone: {_alone(*one.alone)}; {_choice(one)}")
    if outcomes:
        met = sum(one.met for one in outcomes)
        close = sum(abs(one.memory_error) <= MEMORY_WITHIN for one in outcomes)
        lines.append(
            f"{met} of {len(outcomes)} within {WITHIN:.0%} of TTFT and TPOT;"
            f" {close} of {len(outcomes)} within {MEMORY_WITHIN:.0%} of memory."
        )
    lines += [f"{one.setup.name}: {one.setup.about}." for one in outcomes]
    return "\n".join(lines) + "\n"


def _alone(told: Times, was: Times) -> str:
    return (
        f"TTFT {_ms(told.ttft_s)} predicted, {_ms(was.ttft_s)} measured; TPOT"
        f" {_ms(told.tpot_s)} and {_ms(was.tpot_s)}"
    )


def _choice(one: Outcome) -> str:
    if one.choice_right:
        return "which is faster was predicted"
    return "which is faster was predicted WRONG"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:.0f}"
