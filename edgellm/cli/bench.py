"""``edgellm bench``: a model in stages against the whole model, or against llama.cpp's RPC."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm.bench import control, rpc, rpcbuild, speed
from edgellm.bench.pairs import Case, fitting
from edgellm.bench.synthetic import cached_model
from edgellm.cli import options as o
from edgellm.cli.benchtables import control_table, rpc_table, speed_table
from edgellm.cli.output import emit, run, say, tell
from edgellm.errors import UsageError
from edgellm.modelref import OpenedModel, open_reference
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
ControlOption = Annotated[
    bool,
    typer.Option(
        "--control",
        help="Only the machine: two whole models at once against one alone.",
        envvar="EDGELLM_CONTROL",
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
    as_json: o.Json = False,
) -> None:
    """Measure decode and prefill over stages against the whole model on one thread."""

    async def work() -> None:
        if only_control and against_rpc:
            raise UsageError(
                "--control and --rpc are two benches.", hint="Run one, then the other."
            )
        cases = _named(rpc.CASES if against_rpc else speed.CASES, only)
        opened = open_reference(model or str(cached_model(tell)))
        plan = speed.Bench(
            opened=opened,
            cases=_possible(cases, opened),
            devices=devices,
            pairs=pairs,
            chunk=chunk,
            stages=stages,
            # RPC servers keep weights as they are in the file: kernel for kernel the same.
            weights=weights or (Weights.PLAIN if against_rpc else Weights.AUTO),
        )
        if only_control:
            controls = await control.measure_control(plan, tell)
            data = {"control": [each.to_dict() for each in controls]}
            text = control_table(controls)
        elif against_rpc:
            given = rpcbuild.given_build(rpc_build) if rpc_build else None
            build = given or await rpcbuild.kept_build(tell)
            compared = await rpc.measure_rpc(plan, build, tell)
            data, text = compared.to_dict(), rpc_table(compared)
        else:
            report = await speed.measure(plan, tell)
            data, text = report.to_dict(), speed_table(report)
        if as_json:
            emit(data)
        else:
            say(text)

    run(work, as_json)


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
