"""What the benches measured, for people. Pure: reports in, text out; times are medians."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from edgellm.bench.agreement import told
from edgellm.bench.control import Control
from edgellm.bench.onnxcut import TARGET, OnnxCutReport
from edgellm.bench.pairs import Result
from edgellm.bench.rpc import LOAD_TARGET, Loads, RpcReport, TokenBytes, median_load
from edgellm.bench.serving import ServingReport
from edgellm.bench.speed import Report, StageMemory

GIGABIT = 125e6
"""Bytes per second."""
WHERE = (
    "The first device is a node of this process, as in `edgellm chat`; the others are processes of"
    " their own, over TLS on loopback."
)
APART = "Every device is a process of its own, and so are we; TLS between all of them."


def speed_table(report: Report, apart: bool = False) -> str:
    """Stages against the whole model."""
    stages = len(report.plan.stages)
    lines = [
        f"{stages} stages of one thread against the whole model on one thread; medians, ms.",
        *_pairs_table("whole", "stages", report.results),
        "decode: time per output token, compute summed over the stages, ratio stages / whole.",
        "prefill: time to first token, compute of the busiest stage, ratio whole / stages.",
    ]
    # In a prefill, many chunks are acknowledged for the one token that comes of it.
    for result in report.results:
        if not result.case.speedup:
            returned = result.median("returned_bytes")
            lines.append(f"Bytes that come back from the last stage for a token: {returned:.0f}.")
    lines += map(_memory_line, report.memory)
    lines.append(APART if apart else WHERE)
    return "\n".join(lines) + "\n"


def rpc_table(report: RpcReport, apart: bool = False) -> str:
    """Stages against llama.cpp's RPC servers."""
    plan = report.plan
    layers = " and ".join(f"{stage.span.first}-{stage.span.end - 1}" for stage in plan.stages)
    lines = [
        f"llama.cpp over {len(plan.stages)} RPC servers against edgellm over as many stages, a"
        " thread each; medians, ms.",
        f"Layers {layers} in both; our weights are {plan.settings.weights.value}, those of RPC"
        f" servers plain. RPC is as by default; its prefill is fastest here in chunks of"
        f" {report.best_chunk}.",
        *_pairs_table("RPC", "ours", report.results),
        *_load_lines(report.loads),
        *_bytes_lines(report.token_bytes),
        "decode: time per output token; prefill: time to first token; ratios RPC / ours.",
        "load: from asking for the model to its first token, with the model's file in memory.",
        APART if apart else WHERE,
    ]
    if not report.same_kernels:
        lines.append(
            "Not the same kernels: the two llama.cpp builds use different instructions of this"
            " processor, so the ratios are of more than the two ways to split."
        )
    return "\n".join(lines) + "\n"


def safety_table(results: Sequence[Result]) -> str:
    """Stages with encryption and heartbeats against the same without."""
    lines = [
        "The same stages without encryption and heartbeats, and with them; medians, ms.",
        *_pairs_table("bare", "safe", results),
        "Time per output token, compute summed over the stages, ratio safe / bare.",
    ]
    return "\n".join(lines) + "\n"


def prefix_table(results: Sequence[Result]) -> str:
    """Requests that begin like an earlier one against such as compute all of their prompt."""
    lines = [
        "A prompt that is computed whole, and one whose beginning is known; medians, ms.",
        *_pairs_table("whole", "known", results),
        "Time to first token, compute of the busiest stage, ratio known / whole.",
    ]
    return "\n".join(lines) + "\n"


def serving_table(report: ServingReport, apart: bool = False) -> str:
    """Several streams at once over stages, against the best there could be, and llama-server."""
    streams = sorted(report.rounds[0].steps_s)
    layers = " and ".join(
        f"{stage.span.first}-{stage.span.end - 1}" for stage in report.plan.stages
    )
    lines = [
        f"{streams[-1]} answers at once over {len(report.plan.stages)} stages of one thread (layers"
        f" {layers}); medians, tokens a second of all together.",
        "The whole model on one thread, ms a step: "
        + ", ".join(f"{report.step_s(count) * 1000:.1f} of {count}" for count in streams)
        + ".",
        f"{'':30}{'tokens/s':>10}{'ours over it':>14}{'min':>8}{'max':>8}  target",
        f"{'edgellm':30}{report.median('ours') or 0.0:10.1f}",
    ]
    values = ("ideal", "one_batch", "rpc")
    for target, name in zip(report.targets, values, strict=False):
        ratios = target.ratios
        lines.append(
            f"{target.name:30}{report.median(name) or 0.0:10.1f}{target.ratio:14.3f}"
            f"{min(ratios):8.3f}{max(ratios):8.3f}  >= {target.least:.2f} {_verdict(target.met)}"
        )
    if report.no_rpc:
        lines.append(f"llama-server over RPC was not measured: {report.no_rpc}")
    half = streams[-2]
    busy = " and ".join(f"{part:.0%}" for part in report.utilisation)
    found = told(report.agreements)
    gap = found["largest_gap"]
    lines += [
        f"The ideal: two micro-batches of {half} over two stages that never wait, {streams[-1]}"
        f" tokens in the time of one step of {half}. Our stages computed {busy} of their time,"
        " prompts and ends included.",
        f"{found['agreed']} of {found['tokens']} tokens are those of each answer alone;"
        f" {found['differ']} of {found['answers']} answers differ somewhere"
        + ("." if gap is None else f", where the two best logits lay {gap:.3f} apart at most."),
        APART if apart else WHERE,
    ]
    return "\n".join(lines) + "\n"


def onnx_table(report: OnnxCutReport) -> str:
    """An ONNX model in two sessions against one."""
    last = report.layers[-1]
    lines = [
        f"An ONNX model of {last} layers cut at {report.layers[0]}, against itself in one session;"
        " one process, one thread; medians, ms of processor time.",
        f"{'':14}{'whole':>10}{'cut':>10}{'ratio':>8}{'min':>8}{'max':>8}  target",
    ]
    cut = median(report.steps_s["cut"]) * 1000
    for name, words in (("plain", "onnxruntime"), ("whole", "our engine")):
        ratios, step = report.ratios(name), median(report.steps_s[name]) * 1000
        lines.append(
            f"{words:14}{step:10.2f}{cut:10.2f}{report.ratio(name):8.3f}{min(ratios):8.3f}"
            f"{max(ratios):8.3f}  <= {TARGET:.2f}"
        )
    lines.append(f"A step of one token: {_verdict(report.met)}. All runs said the same tokens.")
    return "\n".join(lines) + "\n"


def control_table(controls: Sequence[Control]) -> str:
    """Two whole models at once against one alone."""
    lines = [
        "Two whole models at once, a thread and a processor each, against one alone; medians, ms.",
        f"{'':14}{'alone':>10}{'together':>10}{'ratio':>8}{'min':>8}{'max':>8}",
    ]
    for each in controls:
        alone, together = median(each.alone_s) * 1000, median(each.together_s) * 1000
        ratios = each.ratios
        lines.append(
            f"{each.case.name:14}{alone:10.2f}{together:10.2f}"
            f"{each.ratio:8.3f}{min(ratios):8.3f}{max(ratios):8.3f}"
        )
    lines.append(
        "1 is a machine whose processors share nothing. The spread from min to max is what a figure"
        " measured here can be trusted to."
    )
    return "\n".join(lines) + "\n"


def _pairs_table(yardstick: str, ours: str, results: Sequence[Result]) -> list[str]:
    lines = [
        f"{'':14}{yardstick:>10}{ours:>10}{'compute':>10}{'other':>10}{'ratio':>8}"
        f"{'min':>8}{'max':>8}  target"
    ]
    for result in results:
        ratios = result.ratios
        names = ("yardstick_s", "ours_s", "compute_s", "other_s")
        sign = ">=" if result.case.speedup else "<="
        lines.append(
            f"{result.case.name:14}"
            + "".join(f"{result.median(name) * 1000:10.2f}" for name in names)
            + f"{result.ratio:8.3f}{min(ratios):8.3f}{max(ratios):8.3f}"
            + f"  {sign} {result.case.target:.2f} {_verdict(result.met)}"
        )
    return lines


def _load_lines(loads: Loads) -> list[str]:
    rpc, ours = median_load(loads.rpc_again), median_load(loads.ours_again)
    cached = median_load(loads.rpc_cached)
    verdict = f"{'':16}  >= {LOAD_TARGET:.2f} {_verdict(loads.met)}"
    moved = loads.rpc_again[-1].moved_bytes
    return [
        _load_line("load, first", loads.rpc_first.seconds, loads.ours_first.seconds),
        _load_line("load, again", rpc, ours) + verdict,
        _load_line("RPC --cache", cached, ours) + "  (servers that keep large tensors on disk)",
        f"A load again moves {_megabytes(moved)} over RPC,"
        f" {_megabytes(loads.rpc_cached[-1].moved_bytes)} with its cache, and"
        f" {_megabytes(loads.ours_again[-1].moved_bytes)} of ours. By its bytes alone a gigabit"
        f" link takes {moved / GIGABIT:.1f} s for the first.",
    ]


def _load_line(name: str, rpc_s: float, ours_s: float) -> str:
    return f"{name:14}{rpc_s * 1000:10.0f}{ours_s * 1000:10.0f}{'':20}{rpc_s / ours_s:8.3f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _bytes_lines(moved: TokenBytes) -> list[str]:
    if moved.rpc is None:
        return [f"{'bytes/token':14}{'unknown':>10}{moved.ours:10.0f}"]
    return [
        f"{'bytes/token':14}{moved.rpc:10.0f}{moved.ours:10.0f}{'':20}{moved.rpc / moved.ours:8.1f}"
    ]


def _memory_line(stage: StageMemory) -> str:
    return (
        f"Memory of the stage on {stage.device}: predicted {stage.predicted / 2**20:.0f} MiB,"
        f" peak {stage.peak / 2**20:.0f} MiB ({stage.predicted / stage.peak:.3f} x, of"
        f" {stage.allowed / 2**20:.0f} MiB allowed): {_verdict(stage.met)}"
    )


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"
