"""``edgellm chat`` and ``edgellm demo``: one answer, over peers or over local devices."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, replace

import psutil

from edgellm.answer import Completion, GenerateOptions, LoadOptions
from edgellm.cli import options as o
from edgellm.cli.output import emit, run, say, tell
from edgellm.client import Cluster, LoadedModel, plan_over
from edgellm.errors import UsageError
from edgellm.localcluster import aside, local_cluster, local_devices, our_processors
from edgellm.modelref import OpenedModel, demo_model, open_reference
from edgellm.planner import DeviceOffer
from edgellm.settings import NodeSettings, default_home
from edgellm.types import Activations, DeviceId, Plan, SamplerSettings

DEMO_MEMORY_SHARE = 0.8
"""Of the machine's free memory, for all demo devices together."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Everything that ``chat`` and ``demo`` have in common."""

    model: str
    prompt: str
    load: LoadOptions
    generate: GenerateOptions
    as_json: bool


def ask_from(
    *,
    model: str | None,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    logit_bias: list[str] | None,
    seed: int,
    stop: list[str] | None,
    raw: bool,
    ignore_eos: bool,
    deadline: float,
    exact: bool,
    stages: str | None,
    activations: str | None,
    threads: int,
    ctx: int | None,
    chunk: int | None,
    kv_type: str,
    as_json: bool,
) -> Ask:
    """Raises UsageError for what typer cannot check."""
    if model is None:
        model = demo_model()
        tell(
            "This is the small demo model: it knows a few hundred sentences. For a real one, get"
            " a GGUF file (huggingface.co has thousands) and name it with --model."
        )
    if prompt is None:
        raise UsageError("there is no prompt.", hint="Give one with --prompt.")
    kinds = [kind.value for kind in Activations]
    if activations is not None and activations not in kinds:
        raise UsageError(f"--activations {activations!r} is not one of {', '.join(kinds)}.")
    return Ask(
        model=model,
        prompt=prompt,
        load=LoadOptions(
            stages=stages,
            exact=exact,
            activations=Activations(activations) if activations else None,
            context=ctx,
            chunk=chunk,
            kv_type=kv_type,
            threads=threads,
        ),
        generate=GenerateOptions(
            max_tokens=max_tokens,
            sampler=SamplerSettings(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=o.parse_biases(logit_bias),
                seed=seed,
            ),
            stop=tuple(stop or ()),
            raw=raw,
            ignore_eos=ignore_eos,
            deadline_s=deadline,
        ),
        as_json=as_json,
    )


def chat(
    model: o.Model = None,
    prompt: o.Prompt = None,
    peer: o.Peers = None,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.8,
    top_k: o.TopK = 40,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    repeat_penalty: o.RepeatPenalty = 1.0,
    presence_penalty: o.PresencePenalty = 0.0,
    frequency_penalty: o.FrequencyPenalty = 0.0,
    logit_bias: o.LogitBias = None,
    seed: o.Seed = 0,
    stop: o.Stop = None,
    raw: o.Raw = False,
    ignore_eos: o.IgnoreEos = False,
    deadline: o.Deadline = 600.0,
    exact: o.Exact = False,
    stages: o.Stages = None,
    activations: o.ActivationsOption = None,
    threads: o.Threads = 0,
    ctx: o.Context = None,
    chunk: o.Chunk = None,
    kv_type: o.KvType = "f16",
    name: o.Name = None,
    home: o.Home = None,
    memory: o.Memory = None,
    as_json: o.Json = False,
) -> None:
    """Answer a prompt, on this device and the peers named."""
    given = {k: v for k, v in locals().items() if k not in ("peer", "name", "home", "memory")}

    async def work() -> None:
        ask = ask_from(**given)
        opened = await asyncio.to_thread(open_reference, ask.model)
        local = NodeSettings(
            name=name or socket.gethostname(),
            home=home or default_home(),
            memory_bytes=o.parse_size(memory),
            threads=threads,
        )
        async with Cluster.connect(peer or (), local=local) as cluster:
            plan = plan_over(opened, cluster.offers(opened.engine), ask.load)
            await _answer(cluster, opened, plan, ask)

    run(work, as_json)


def demo(
    devices: o.Devices = 3,
    model: o.Model = None,
    prompt: o.Prompt = None,
    max_tokens: o.MaxTokens = 256,
    temperature: o.Temperature = 0.8,
    top_k: o.TopK = 40,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    repeat_penalty: o.RepeatPenalty = 1.0,
    presence_penalty: o.PresencePenalty = 0.0,
    frequency_penalty: o.FrequencyPenalty = 0.0,
    logit_bias: o.LogitBias = None,
    seed: o.Seed = 0,
    stop: o.Stop = None,
    raw: o.Raw = False,
    ignore_eos: o.IgnoreEos = False,
    deadline: o.Deadline = 600.0,
    exact: o.Exact = False,
    stages: o.Stages = None,
    activations: o.ActivationsOption = None,
    threads: o.Threads = 0,
    ctx: o.Context = None,
    chunk: o.Chunk = None,
    kv_type: o.KvType = "f16",
    memory: o.Memory = None,
    pin: o.DemoPin = True,
    as_json: o.Json = False,
) -> None:
    """Start devices a, b, c, ... on this machine, split a model over them and answer."""
    given = {k: v for k, v in locals().items() if k not in ("devices", "memory", "pin")}

    async def work() -> None:
        ask = ask_from(**given)
        opened = await asyncio.to_thread(open_reference, ask.model)
        total = o.parse_size(memory) * devices
        local = local_devices(
            devices,
            memory_bytes=total or int(psutil.virtual_memory().available * DEMO_MEMORY_SHARE),
            processors=our_processors(),
            threads=threads,
            pin=pin,
        )
        load = replace(ask.load, use_all=ask.load.stages is None)
        # We know what our own devices will offer: a plan that cannot be is refused before
        # anything is started.
        expected = [DeviceOffer(d.name, DeviceId(d.name), d.memory_bytes) for d in local]
        plan_over(opened, expected, load)
        tell(f"Starting {devices} devices on this machine ...")
        with aside(local):
            async with (
                local_cluster(local) as nodes,
                Cluster.connect([node.address for node in nodes]) as cluster,
            ):
                plan = plan_over(opened, cluster.offers(opened.engine), load)
                await _answer(cluster, opened, plan, replace(ask, load=load))

    run(work, as_json)


async def _answer(cluster: Cluster, opened: OpenedModel, plan: Plan, ask: Ask) -> None:
    tell(_plan_text(opened, plan))
    async with cluster.load(opened, plan=plan) as model:
        tell(f"Loaded in {model.load_s:.1f} s.")
        if opened.chat_template is None and not ask.generate.raw:
            tell("This model has no chat template: your prompt is continued as it is.")
        completion = await _show(model, ask)
        if ask.as_json:
            emit(completion.to_dict())
        else:
            tell(_figures_text(completion))


async def _show(model: LoadedModel, ask: Ask) -> Completion:
    """The answer, streamed to the screen unless it goes into JSON."""
    stream = model.answer(ask.prompt, ask.generate)
    async with contextlib.aclosing(stream.pieces()) as pieces:
        async for piece in pieces:
            if not ask.as_json:
                say(piece.text)
    if not ask.as_json:
        say("\n")
    return stream.completion()


def _plan_text(opened: OpenedModel, plan: Plan) -> str:
    parts = [
        f"{stage.device}: layers {stage.span.first} to {stage.span.end - 1}"
        f" ({stage.memory_bytes / 2**20:.0f} MiB)"
        for stage in plan.stages
    ]
    return f"{opened.name}: {plan.layers} layers over {', '.join(parts)}. {plan.why}"


def _figures_text(completion: Completion) -> str:
    figures = completion.figures
    ttft, tpot = figures.ttft_s, figures.tpot_s
    speed = f", then {1 / tpot:.1f} tokens/s" if tpot else ""
    first = f"first token after {ttft * 1000:.0f} ms" if ttft is not None else "no token"
    return f"[{len(completion.tokens)} tokens, {first}{speed}; {completion.finish_reason.value}]"
