"""What the fault bench found, for people. Pure: reports in, text out."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.bench.assaults import Assault
from edgellm.bench.faults import Series, percentiles

_PARTS = ("replan_s", "load_s", "fetch_s", "replay_s")


def chaos_table(series: Sequence[Series], repelled: Sequence[Assault]) -> str:
    """Faults first, then assaults. Times in seconds, p50 / p95."""
    lines = [
        f"{'fault':26}{'trials':>7}{'lost':>6}{'repeated':>9}{'changed':>8}{'detect':>14}"
        f"{'next token':>14}"
    ]
    for each in series:
        damage = each.damage
        lines.append(
            f"{each.name[:25]:26}{len(each.outcomes):7}{damage.lost:6}{damage.repeated:9}"
            f"{damage.changed:8}{_times(each, 'detect_s'):>14}{_times(each, 'next_token_s'):>14}"
        )
        lines += [f"  {line}" for line in _ways(each)]
    lines += [
        "",
        f"{'assault':34}{'tries':>9}{'repelled':>10}{'worst':>10}{'late':>6}{'memory':>10}",
    ]
    for assault in repelled:
        worst = f"{assault.worst_s * 1000:.1f} ms" if assault.worst_s else ""
        memory = f"{assault.more_bytes / 2**20:.1f} MiB" if assault.worst_s else ""
        lines.append(
            f"{assault.name:34}{assault.tries:9}{assault.repelled:10}{worst:>10}{assault.late:6}{memory:>10}"
        )
    return "\n".join(lines) + "\n"


def _times(series: Series, name: str) -> str:
    found = percentiles(series.times(name))
    return f"{found['p50']:.2f} / {found['p95']:.2f}" if found else "-"


def _ways(series: Series) -> list[str]:
    told = series.to_dict()
    ways = ", ".join(f"{way}: {count}" for way, count in told["ways"].items())
    parts = [f"{name[:-2]} {_times(series, name)}" for name in _PARTS if series.times(name)]
    lines = [f"{ways}; {', '.join(parts)}" if parts else ways] if ways else []
    return lines + [f"problem: {problem}" for problem in told["problems"][:3]]
