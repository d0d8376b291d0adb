"""``edgellm bench``: a model in stages against the whole model, side by side in one run."""

from __future__ import annotations

from dataclasses import replace

from edgellm.bench.speed import CASES, Bench, Report, StageMemory, measure
from edgellm.bench.synthetic import cached_model
from edgellm.cli import options as o
from edgellm.cli.output import emit, run, say, tell
from edgellm.errors import UsageError
from edgellm.modelref import open_reference


def bench(
    model: o.Model = None,
    devices: o.BenchDevices = 2,
    pairs: o.Pairs = 7,
    chunk: o.Chunk = None,
    only: o.Only = None,
    as_json: o.Json = False,
) -> None:
    """Measure decode and prefill over stages against the whole model on one thread."""

    async def work() -> None:
        cases = tuple(case for case in CASES if only is None or case.name.startswith(only))
        if not cases:
            names = ", ".join(case.name for case in CASES)
            raise UsageError(f"there is nothing to measure named {only!r}.", hint=f"Try: {names}.")
        opened = open_reference(model or str(cached_model(tell)))
        fitting = tuple(case for case in cases if case.cells <= opened.context_train)
        if opened.engine != "llama" or not fitting:
            raise UsageError(
                f"{opened.name} cannot be measured: its context is {opened.context_train} tokens.",
                hint="Name a GGUF with a longer one, or leave --model out.",
            )
        for case in cases:
            if case not in fitting:
                tell(f"{case.name} is left out: the model's context is too short for it.")
        plan = Bench(opened, stages=devices, pairs=pairs, chunk=chunk)
        report = await measure(replace(plan, cases=fitting), tell)
        if as_json:
            emit(report.to_dict())
        else:
            say(table(report, devices))

    run(work, as_json)


def table(report: Report, stages: int) -> str:
    """The report for people; times in milliseconds, medians over the pairs."""
    lines = [
        f"{stages} stages of one thread against the whole model on one thread; medians, ms.",
        f"{'':14}{'whole':>10}{'stages':>10}{'compute':>10}{'other':>10}{'ratio':>8}"
        f"{'min':>8}{'max':>8}  target",
    ]
    for result in report.results:
        ratios = result.ratios
        cells = [
            result.median(name) * 1000 for name in ("whole_s", "ours_s", "compute_s", "other_s")
        ]
        sign = ">=" if result.case.speedup else "<="
        lines.append(
            f"{result.case.name:14}"
            + "".join(f"{cell:10.2f}" for cell in cells)
            + f"{result.ratio:8.3f}{min(ratios):8.3f}{max(ratios):8.3f}"
            + f"  {sign} {result.case.target:.2f} {'met' if result.met else 'NOT MET'}"
        )
    lines.append(
        "decode: time per output token, compute summed over the stages, ratio stages / whole."
    )
    lines.append(
        "prefill: time to first token, compute of the busiest stage, ratio whole / stages."
    )
    returned = max(result.median("returned_bytes") for result in report.results)
    lines.append(f"Bytes that come back from the last stage for a token: {returned:.0f}.")
    lines += map(_memory_line, report.memory)
    lines.append(
        "The first device is a node of this process, as in `edgellm chat`; the others are"
        " processes of their own, over TCP on loopback."
    )
    return "\n".join(lines) + "\n"


def _memory_line(stage: StageMemory) -> str:
    return (
        f"Memory of the stage on {stage.device}: predicted {stage.predicted / 2**20:.0f} MiB,"
        f" peak {stage.peak / 2**20:.0f} MiB ({stage.predicted / stage.peak:.3f} x, of"
        f" {stage.allowed / 2**20:.0f} MiB allowed): {'met' if stage.met else 'NOT MET'}"
    )
