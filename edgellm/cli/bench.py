"""``edgellm bench``: a model in stages against the whole model, or against llama.cpp's RPC."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgellm.bench import control, link, prefix, rpc, rpcbuild, safety, serving, setups, speed
from edgellm.bench.onnxcut import measure_onnx_cut
from edgellm.bench.onnxmodel import cached_onnx_model
from edgellm.bench.pairs import Case, fitting
from edgellm.bench.synthetic import cached_model
from edgellm.cli import options as o
from edgellm.cli.benchtables import (
    control_table,
    onnx_table,
    prefix_table,
    rpc_table,
    safety_table,
    serving_table,
    speed_table,
)
from edgellm.cli.fetching import opened_model
from edgellm.cli.output import emit, run, say, tell
from edgellm.cli.setuptable import setups_table
from edgellm.errors import EdgeError, UsageError
from edgellm.modelref import OpenedModel
from edgellm.types import Weights

Rpc = Annotated[
    bool,
    typer.Option("--rpc", help="Against llama.cpp's own RPC servers.", envvar="EDGELLM_RPC"),
]
RpcBuildFolder = Annotated[
    Path | None,
    typer.Option(
        "--rpc-build",
        help="Folder of a llama.cpp built with RPC; default: built once, and kept.",
        envvar="EDGELLM_RPC_BUILD",
    ),
]
BenchWeights = Annotated[
    Weights | None,
    typer.Option(
        "--weights",
        help="How stages keep weights: auto, repacked, plain; default: auto, against RPC plain.",
        envvar="EDGELLM_WEIGHTS",
    ),
]
Safety = Annotated[
    bool,
    typer.Option(
        "--safety",
        help="What encryption and heartbeats cost: stages with them against stages without.",
        envvar="EDGELLM_SAFETY",
    ),
]
Prefix = Annotated[
    bool,
    typer.Option(
        "--prefix",
        help="Requests that begin like an earlier one against such as compute all of their prompt.",
        envvar="EDGELLM_PREFIX",
    ),
]
Serving = Annotated[
    bool,
    typer.Option(
        "--serving",
        help="Eight answers at once: against the best that two stages can do, and llama-server.",
        envvar="EDGELLM_SERVING",
    ),
]
ControlOption = Annotated[
    bool,
    typer.Option(
        "--control",
        help="Only the machine: two whole models at once against one alone.",
        envvar="EDGELLM_CONTROL",
    ),
]
Setups = Annotated[
    bool,
    typer.Option(
        "--setups",
        help="The planner's predictions against real pipelines: slow devices, slow links.",
        envvar="EDGELLM_SETUPS",
    ),
]
OnlyOnnx = Annotated[
    bool,
    typer.Option(
        "--onnx",
        help="Only what cutting an ONNX model costs: two sessions against one, in one process.",
        envvar="EDGELLM_ONNX",
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        link.OPTION,
        metavar="RATE",
        help="Over a network of this speed (100mbit, 1gbit); needs Linux and root.",
        envvar="EDGELLM_LINK",
    ),
]
Apart = Annotated[
    bool,
    typer.Option(
        "--apart",
        help="Every device is a process of its own, and none of them ours; so with --link.",
        envvar="EDGELLM_APART",
    ),
]


def bench(
    model: o.Model = None,
    devices: o.BenchDevices = 2,
    pairs: o.Pairs = 7,
    chunk: o.Chunk = None,
    stages: o.Stages = None,
    weights: BenchWeights = None,
    only: o.Only = None,
    against_rpc: Rpc = False,
    rpc_build: RpcBuildFolder = None,
    only_control: ControlOption = False,
    only_safety: Safety = False,
    only_prefix: Prefix = False,
    only_serving: Serving = False,
    only_setups: Setups = False,
    only_onnx: OnlyOnnx = False,
    rate: Link = None,
    apart: Apart = False,
    as_json: o.Json = False,
) -> None:
    """Measure decode and prefill over stages against the whole model on one thread."""
    code = 0

    async def again_inside(speed: str) -> None:
        nonlocal code
        async with link.slow_loopback(link.check_rate(speed)) as namespace:
            arguments = [*link.without_link(sys.argv[1:]), "--apart"]
            code = await link.run_inside(namespace, arguments)

    async def work() -> None:
        if only_setups:
            await _measure_setups(model, only, as_json)
            return
        if only_onnx:
            await _measure_onnx(model, pairs, as_json)
            return
        if rate is not None:
            await again_inside(rate)
            return
        if only_control + against_rpc + only_safety + only_prefix + only_serving > 1:
            raise UsageError(
                "--control, --rpc, --safety, --prefix and --serving are different benches.",
                hint="Run one after the other.",
            )
        all_cases = rpc.CASES if against_rpc else safety.CASES if only_safety else speed.CASES
        all_cases = prefix.CASES if only_prefix else all_cases
        all_cases = serving.CASES if only_serving else all_cases
        cases = _named(all_cases, only)
        opened = await opened_model(model or str(cached_model(tell)))
        plan = speed.Bench(
            opened=opened,
            cases=_possible(cases, opened),
            devices=devices,
            pairs=pairs,
            chunk=chunk,
            stages=stages,
            apart=apart,
            # RPC servers keep weights as they are in the file: kernel for kernel the same.
            weights=weights or (Weights.PLAIN if against_rpc else Weights.AUTO),
        )
        if only_control:
            controls = await control.measure_control(plan, tell)
            data = {"control": [each.to_dict() for each in controls]}
            text = control_table(controls)
        elif only_safety:
            results = await safety.measure_safety(plan, tell)
            data = {"results": [each.to_dict() for each in results]}
            text = safety_table(results)
        elif only_prefix:
            results = await prefix.measure_prefix(plan, tell)
            data = {"results": [each.to_dict() for each in results]}
            text = prefix_table(results)
        elif only_serving:
            served = await serving.measure_serving(plan, await _server(rpc_build), tell)
            data, text = served.to_dict(), serving_table(served, apart)
        elif against_rpc:
            given = rpcbuild.given_build(rpc_build) if rpc_build else None
            build = given or await rpcbuild.kept_build(tell)
            compared = await rpc.measure_rpc(plan, build, tell)
            data, text = compared.to_dict(), rpc_table(compared, apart)
        else:
            report = await speed.measure(plan, tell)
            data, text = report.to_dict(), speed_table(report, apart)
        if as_json:
            emit(data)
        else:
            say(text)

    run(work, as_json)
    if code:
        sys.exit(code)


async def _server(folder: Path | None) -> rpcbuild.RpcBuild | str:
    """A build with llama.cpp's own server, or why there is none: the rest can be measured."""
    if folder is not None:
        return rpcbuild.given_build(folder, serving=True)
    try:
        return await rpcbuild.kept_build(tell, serving=True)
    except EdgeError as error:
        tell(f"llama-server is left out: {error}")
        return str(error)


async def _measure_setups(model: str | None, only: str | None, as_json: bool) -> None:
    chosen = [each for each in setups.SETUPS if only is None or each.name.startswith(only)]
    if not chosen:
        names = ", ".join(each.name for each in setups.SETUPS)
        raise UsageError(f"there is no set-up named {only!r}.", hint=f"Try: {names}.")
    opened = await opened_model(model or str(cached_model(tell)))
    outcomes = await setups.measure_setups(opened, chosen, tell)
    if as_json:
        emit({"setups": [each.to_dict() for each in outcomes]})
    else:
        say(setups_table(outcomes))


async def _measure_onnx(model: str | None, pairs: int, as_json: bool) -> None:
    path = Path(model) if model else cached_onnx_model(tell)
    report = await measure_onnx_cut(path, pairs, tell)
    if as_json:
        emit(report.to_dict())
    else:
        say(onnx_table(report))


def _named(cases: tuple[Case, ...], only: str | None) -> tuple[Case, ...]:
    named = tuple(case for case in cases if only is None or case.name.startswith(only))
    if not named:
        names = ", ".join(case.name for case in cases)
        raise UsageError(f"there is nothing to measure named {only!r}.", hint=f"Try: {names}.")
    return named


def _possible(cases: tuple[Case, ...], opened: OpenedModel) -> tuple[Case, ...]:
    possible = fitting(cases, opened.context_train, tell)
    if opened.engine != "llama" or not possible:
        raise UsageError(
            f"{opened.name} cannot be measured: its context is {opened.context_train} tokens.",
            hint="Name a GGUF with a longer one, or leave --model out.",
        )
    return possible
