"""The Python API: connect to devices, load a model over them, generate. Async.

::

    async with Cluster.connect(peers=["192.168.1.7:7171"]) as cluster:
        async with cluster.load("tinyllama.gguf") as model:
            async for piece in model.stream("Once upon a time"):
                print(piece.text, end="")

Errors are ``EdgeError``s, each with an ``exit_code`` and words that a person can act on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

from edgellm.answer import Completion, GenerateOptions, LoadOptions, Piece
from edgellm.engine.text import VocabularyInfo
from edgellm.engine.textstream import IncrementalDecoder, StopMatcher
from edgellm.errors import DeadlineError, EdgeError, NoPlanError, UsageError
from edgellm.figures import Figures, Snapshot
from edgellm.modelref import OpenedModel, Text, open_reference
from edgellm.node import SOFTWARE, Node
from edgellm.planner import DeviceOffer, parse_stages, plan_by_memory, plan_manual
from edgellm.runtime.coordinator import Coordinator, ModelSource, Peer, Progress, new_epoch
from edgellm.runtime.pipeline import MadeToken, Pipeline, Request, Running
from edgellm.runtime.session import Introduction
from edgellm.settings import NodeSettings
from edgellm.store.home import HomeBusyError
from edgellm.transport.base import Transport
from edgellm.transport.tcp import TcpTransport
from edgellm.types import (
    DeviceId,
    FinishReason,
    Plan,
)

__all__ = [
    "Answer",
    "Cluster",
    "Completion",
    "GenerateOptions",
    "LoadOptions",
    "LoadedModel",
    "Messages",
    "Piece",
    "Prompt",
    "parse_address",
    "plan_over",
]

Messages: TypeAlias = Sequence[dict[str, Any]]
"""Chat messages, each with ``role`` and ``content``."""
Prompt: TypeAlias = str | Messages | Sequence[int]
"""Text, chat messages, or token ids."""

COORDINATOR_NAME = "coordinator"


def plan_over(opened: OpenedModel, offers: Sequence[DeviceOffer], options: LoadOptions) -> Plan:
    """The plan for a model over what devices offer. Pure; raises SplitError or NoPlanError."""
    settings = options.settings(opened.context_train)
    epoch = new_epoch()
    if options.stages is not None:
        return plan_manual(opened.card, offers, parse_stages(options.stages), settings, epoch)
    return plan_by_memory(opened.card, offers, settings, epoch, use_all=options.use_all)


class LoadedModel:
    """A model that is loaded over its devices. Made by ``Cluster.load``."""

    def __init__(
        self,
        opened: OpenedModel,
        pipeline: Pipeline,
        text: Text,
        vocabulary: VocabularyInfo,
        load_s: float,
    ) -> None:
        self.opened = opened
        self.pipeline = pipeline
        self.load_s = load_s
        self._text = text
        self._vocabulary = vocabulary

    @property
    def plan(self) -> Plan:
        return self.pipeline.plan

    async def prompt_tokens(self, prompt: str | Messages, raw: bool = False) -> list[int]:
        """Token ids of a text, or of chat messages by the model's template."""
        template = self.opened.chat_template
        if isinstance(prompt, str) and (raw or template is None):
            return await self._text.tokenize(prompt, add_special=True, parse_special=False)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if template is None:
            raise UsageError(
                f"{self.opened.name} has no chat template.", hint="Give a text, with --raw."
            )
        rendered = await self._text.render_chat(template, list(messages))
        bos = self._vocabulary.bos_text
        begins = bool(bos) and rendered.startswith(bos)
        return await self._text.tokenize(rendered, add_special=not begins, parse_special=True)

    def answer(self, prompt: Prompt, options: GenerateOptions | None = None) -> Answer:
        """An answer to be streamed, with its figures afterwards."""
        return Answer(self, prompt, options or GenerateOptions())

    async def stream(
        self, prompt: Prompt, options: GenerateOptions | None = None
    ) -> AsyncIterator[Piece]:
        """Generate, piece by piece."""
        async with contextlib.aclosing(self.answer(prompt, options).pieces()) as pieces:
            async for piece in pieces:
                yield piece

    async def complete(self, prompt: Prompt, options: GenerateOptions | None = None) -> Completion:
        """Generate all of it."""
        answer = self.answer(prompt, options)
        async for _ in answer.pieces():
            pass
        return answer.completion()

    async def pieces_of(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes that tokens stand for."""
        return await self._text.pieces(tokens)

    async def request(self, prompt: Prompt, options: GenerateOptions) -> Request:
        """The prompt as tokens, with everything that the pipeline must know."""
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            tokens = list(cast(Sequence[int], prompt))
        else:
            tokens = await self.prompt_tokens(cast(str | Messages, prompt), options.raw)
        return Request(
            prompt=tuple(tokens),
            max_tokens=options.max_tokens,
            sampler=options.sampler,
            stop_tokens=frozenset() if options.ignore_eos else self._vocabulary.eog,
            deadline_s=options.deadline_s,
            logits=options.logits,
        )


class Answer:
    """One answer under way: iterate ``pieces()`` once, then ask for the ``completion()``."""

    def __init__(self, model: LoadedModel, prompt: Prompt, options: GenerateOptions) -> None:
        self._model = model
        self._prompt = prompt
        self._options = options
        self._texts: list[str] = []
        self._made: list[MadeToken] = []
        self._finish = FinishReason.CANCELLED
        self._figures: Figures | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer as it comes. Leaving early cancels it on all devices."""
        pipeline, clock = self._model.pipeline, asyncio.get_running_loop().time
        asked = clock()
        try:
            async with asyncio.timeout(self._options.deadline_s):
                request = await self._model.request(self._prompt, self._options)
                before = await Snapshot.take(pipeline)
        except TimeoutError as error:
            raise DeadlineError("the deadline passed before the request began.") from error
        started = clock()
        request = replace(request, spent_s=started - asked)
        async with pipeline.run(request) as running:
            async for piece in self._read(running):
                self._texts.append(piece.text)
                if piece.made is not None:
                    self._made.append(piece.made)
                yield piece
        self._finish = running.finish or FinishReason.CANCELLED
        self._figures = Figures(
            plan=pipeline.plan,
            coordinator=COORDINATOR_NAME,
            prompt_tokens=len(request.prompt),
            token_times=tuple(made.at - started for made in self._made),
            before=before,
            after=await _after(pipeline, before),
        )

    async def _read(self, running: Running) -> AsyncGenerator[Piece, None]:
        decoder, matcher = IncrementalDecoder(), StopMatcher(self._options.stop)
        async for made in running.tokens():
            data = (await self._model.pieces_of([made.token]))[0]
            yield Piece(matcher.feed(decoder.feed(data)), made)
            if matcher.matched is not None:
                running.stop(FinishReason.STOP)
                break
        rest = matcher.feed(decoder.finish()) + matcher.finish()
        if rest:
            yield Piece(rest, None)

    def completion(self) -> Completion:
        """Text and figures; after ``pieces`` has ended."""
        if self._figures is None:
            raise UsageError("the answer is not complete yet.")
        return Completion(
            text="".join(self._texts),
            tokens=tuple(made.token for made in self._made),
            logits=tuple(made.logits for made in self._made if made.logits is not None),
            finish_reason=self._finish,
            plan=self._model.plan,
            figures=self._figures,
            load_s=self._model.load_s,
        )


async def _after(pipeline: Pipeline, before: Snapshot) -> Snapshot:
    """The counters now. A device that is lost after the answer does not take the answer away:
    its figures are then as if nothing had been counted."""
    try:
        return await Snapshot.take(pipeline)
    except EdgeError:
        return before


class Cluster:
    """Devices we are connected to. Make it with ``Cluster.connect``."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls,
        peers: Sequence[str] = (),
        *,
        local: NodeSettings | None = None,
        transport: Transport | None = None,
        node: Node | None = None,
    ) -> AsyncIterator[Cluster]:
        """Connect to ``HOST:PORT`` peers and, with ``local``, to a node of our own.

        Raises UsageError for a malformed address, PeerLostError for a device that is not there.
        """
        addresses = [parse_address(peer) for peer in peers]
        transport = transport or TcpTransport()
        name = local.name if local else COORDINATOR_NAME
        own = node or (Node(local, transport=transport) if local else None)
        device_id = own.device_id if own else "0" * 64
        coordinator = Coordinator(transport, Introduction(name, device_id, SOFTWARE))
        try:
            if own is not None:
                try:
                    await own.start()
                except HomeBusyError as busy:
                    # This device's node is running already, from another command: it is the one.
                    if not busy.address:
                        raise
                    own = None
                    await coordinator.connect(*parse_address(busy.address))
                else:
                    await coordinator.connect(*own.address, via=own.direct())
            for host, port in addresses:
                await coordinator.connect(host, port)
            yield cls(coordinator)
        finally:
            await coordinator.close()
            if own is not None:
                await own.close()

    def devices(self) -> list[Peer]:
        """Connected devices, in the order they were connected."""
        return list(self._coordinator.peers.values())

    def offers(self, engine: str) -> list[DeviceOffer]:
        """What the devices that have ``engine`` offer to a plan. Raises NoPlanError without any."""
        infos = [peer.info for peer in self.devices() if engine in peer.info.engines]
        if not infos:
            raise NoPlanError(
                f"no connected device has the engine {engine!r}.",
                hint="Install it on at least one: pip install 'edgellm[llama]'.",
            )
        return [DeviceOffer(i.name, DeviceId(i.device_id), i.memory_free) for i in infos]

    @contextlib.asynccontextmanager
    async def load(
        self,
        model: str | OpenedModel,
        options: LoadOptions | None = None,
        *,
        plan: Plan | None = None,
        progress: Progress | None = None,
    ) -> AsyncIterator[LoadedModel]:
        """Plan (unless given a plan), load, and free it again on leaving."""
        started = time.perf_counter()
        if isinstance(model, str):
            opened = await asyncio.to_thread(open_reference, model)
        else:
            opened = model
        plan = plan or plan_over(opened, self.offers(opened.engine), options or LoadOptions())
        source = ModelSource(opened.engine, opened.path, opened.digest, opened.width, opened.vocab)
        text = await opened.text()
        pieces = asyncio.create_task(text.preload())
        try:
            vocabulary = await text.info()
            pipeline = await self._coordinator.load(plan, source, progress)
            try:
                await pieces
                load_s = time.perf_counter() - started
                yield LoadedModel(opened, pipeline, text, vocabulary, load_s)
            finally:
                self._coordinator.unload(pipeline)
        finally:
            pieces.cancel()
            await asyncio.gather(pieces, return_exceptions=True)
            await text.stop()


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPV6]:PORT``. Raises UsageError."""
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"{text!r} is not an address.", hint="Write it like 192.168.1.7:7171.")
    return host, int(port)
