"""Faults that real node processes must survive, or refuse in words: devices and coordinators that
are killed or stopped, full disks, wrong clocks, copied identities, garbage, wrong codes.

Kills in mid-decode are in test_recovery, faults of the network in test_faults_network, many more
of them in ``scripts/chaos``. Bounds are those that are promised, with room for a machine that has
other things to do; without it, they are measured by ``scripts/chaos``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from edgellm.bench.assaults import (
    MORE_MEMORY_BYTES,
    flipped_bytes,
    garbage_into_node,
    wrong_codes,
)
from edgellm.client import Cluster, GenerateOptions, LoadOptions
from edgellm.errors import DeadlineError, PeerLostError, UsageError
from edgellm.identity import TrustStore, load_identity
from edgellm.localcluster import LocalCluster, LocalNode, local_cluster, local_devices
from edgellm.modelfile import read_card
from edgellm.node import credentials_of
from edgellm.runtime.session import Introduction, Session
from edgellm.transport.secure import SecureTransport
from edgellm.types import SamplerSettings
from edgellm.wire.frames import Frame
from edgellm.wire.messages import Message
from tests.cluster.conftest import StartCluster
from tests.cluster.lan import why_not
from tests.cluster.processes import (
    Ended,
    all_gone,
    descendants,
    end_tree,
    environment,
    finish,
    pair_homes,
    stages_of,
    start,
    told,
    wait_for,
)
from tests.cluster.test_recovery import answer, at, pid_of

STORIES = "stories260K-f32.gguf"
SLOW = "stub:6:delay=0.02"
SPLIT = "a:0-2,b:2-4,c:4-6"
PROMPT = list(b"Once upon a time")
DEAD_WITHIN_S = 5.5
FREED_WITHIN_S = 30.0
LOADED_S = 2.0
"""More than a bound, because other tests may run on the same processors."""


def greedy(count: int) -> GenerateOptions:
    sampler = SamplerSettings(temperature=0.0)
    return GenerateOptions(max_tokens=count, sampler=sampler, raw=True, ignore_eos=True)


# --- a device that stops, and one that goes in the middle of a prompt --------------------


def signal_device(pid: int, how: signal.Signals) -> None:
    """To a node and its stages: the whole device, as a lid that is closed does it."""
    for process in [psutil.Process(pid), *descendants(pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(how)


@pytest.mark.slow
async def test_a_device_that_stops_for_ten_seconds(start_cluster: StartCluster) -> None:
    """It is dead for the others after five, and when it wakes, in the middle of the same answer,
    nothing of what it sends counts, and it frees what it holds."""
    options = LoadOptions(stages=SPLIT, exact=True, context=1024)
    async with start_cluster(3) as (cluster, nodes):
        async with cluster.load("stub:6", options) as model:
            expected = await answer(model, PROMPT, greedy(500))
        async with cluster.load(SLOW, options) as model:
            pid, stopped, woke = pid_of(nodes, "b"), [0.0], [0.0]
            zombies = stages_of(pid)
            assert len(zombies) == 1

            async def nap() -> None:
                stopped[0] = time.perf_counter()
                signal_device(pid, signal.SIGSTOP)
                await asyncio.sleep(10.0)
                woke[0] = time.perf_counter()
                signal_device(pid, signal.SIGCONT)

            naps: list[asyncio.Task[None]] = []
            try:
                begin = at(20, lambda: naps.append(asyncio.create_task(nap())))
                made = await answer(model, PROMPT, greedy(500), begin)
                ended = time.perf_counter()
            finally:
                await asyncio.gather(*naps)
            assert made.tokens == expected.tokens
            assert ended > woke[0] + 1.0, "it woke in the middle of the answer"
            (recovery,) = made.recoveries
            noticed = recovery.missed_at - stopped[0]
            print(f"noticed after {noticed:.2f} s; {json.dumps(recovery.to_dict())}")
            assert recovery.device == "b"
            assert noticed <= DEAD_WITHIN_S + LOADED_S
            await asyncio.to_thread(wait_for, lambda: all_gone(zombies), FREED_WITHIN_S)
            peer = await cluster.include(next(n.address for n in nodes if n.device.name == "b"))
            assert peer.info.name == "b"
            assert "b" not in {stage["device"] for stage in await cluster.stages()}
            assert (await answer(model, PROMPT, greedy(20))).tokens == expected.tokens[:20]


async def test_a_device_killed_in_mid_prefill(start_cluster: StartCluster) -> None:
    options = LoadOptions(stages=SPLIT, exact=True, context=1024, chunk=8)
    prompt = [3 + (7 * at) % 200 for at in range(400)]
    async with start_cluster(3) as (cluster, nodes), cluster.load(SLOW, options) as model:
        began = time.perf_counter()
        expected = await answer(model, prompt, greedy(1))
        normal_s = time.perf_counter() - began

        began = time.perf_counter()
        under_way = asyncio.create_task(answer(model, prompt, greedy(1)))
        await asyncio.sleep(normal_s / 2)
        os.kill(pid_of(nodes, "b"), signal.SIGKILL)
        made = await under_way
        took_s = time.perf_counter() - began
        print(f"first token after {took_s:.2f} s, {normal_s:.2f} s without the kill")
        assert [recovery.device for recovery in made.recoveries] == ["b"]
        assert made.tokens == expected.tokens
        assert took_s <= 2 * normal_s + 2.0 + LOADED_S


# --- a coordinator that goes ----------------------------------------------------------


@contextlib.asynccontextmanager
async def three_nodes() -> AsyncIterator[LocalCluster]:
    devices = local_devices(3, memory_bytes=3 << 30, processors=(), threads=1, pin=False)
    async with local_cluster(devices) as local:
        yield local


@contextlib.contextmanager
def chatting(local: LocalCluster, folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """``edgellm chat`` over these nodes, until the end of the block."""
    peers = [word for address in local.addresses for word in ("--peer", address)]
    process = start(
        [
            "chat", "--home", str(local.home), "--no-discovery", "--no-probe", *peers, "--json",
            "--exact", "--model", SLOW, "--stages", SPLIT, "--prompt", "Hello", "--ctx", "2048",
            "--temperature", "0", "--ignore-eos", *more,
        ],
        folder,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            end_tree(process.pid)
        process.communicate()


async def loaded_stages(nodes: list[LocalNode]) -> list[psutil.Process]:
    """The stage processes, once each node has one and it computes."""

    def look() -> list[psutil.Process]:
        return [stage for node in nodes for stage in stages_of(node.process.pid)]

    await asyncio.to_thread(wait_for, lambda: len(look()) == 3)
    await asyncio.sleep(1.0)
    return look()


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
async def test_orphaned_stages_free_their_memory(how: str, tmp_path: Path) -> None:
    async with three_nodes() as local:
        with chatting(local, tmp_path, "--max-tokens", "1000") as chat:
            orphans = await loaded_stages(local.nodes)
            struck = time.monotonic()
            os.kill(chat.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            await asyncio.to_thread(wait_for, lambda: all_gone(orphans), FREED_WITHIN_S)
            print(f"{how}: freed after {time.monotonic() - struck:.1f} s")
            assert all(node.process.returncode is None for node in local.nodes)
            async with Cluster.connect(local.addresses, home=local.home) as cluster:
                assert await cluster.stages() == []


@pytest.mark.slow
async def test_a_coordinator_that_wakes_goes_on_or_says_why(tmp_path: Path) -> None:
    """It was given up; what it has of its answer is whole, and nothing of it is made up."""
    async with three_nodes() as local:
        with chatting(local, tmp_path, "--max-tokens", "150") as chat:
            undisturbed = await asyncio.to_thread(finish, chat)
            assert undisturbed.code == 0, undisturbed.err
        expected = undisturbed.json["tokens"]
        with chatting(local, tmp_path, "--max-tokens", "150") as chat:
            orphans = await loaded_stages(local.nodes)
            os.kill(chat.pid, signal.SIGSTOP)
            await asyncio.to_thread(wait_for, lambda: all_gone(orphans), FREED_WITHIN_S)
            os.kill(chat.pid, signal.SIGCONT)
            ended: Ended = await asyncio.to_thread(finish, chat)
        assert "Traceback" not in ended.err
        print(ended.err)
        if ended.code == 0:
            assert ended.json["tokens"] == expected
        else:
            error = told(ended, ended.code, "lost")
            assert ended.code in {3, 4}
            assert error["tokens"]
            assert error["tokens"] == expected[: len(error["tokens"])]


# --- a full disk ----------------------------------------------------------------------


@pytest.mark.skipif(bool(why_not()), reason="no file systems of one's own here")
@pytest.mark.skipif(shutil.which("nsenter") is None, reason="needs util-linux")
async def test_a_disk_that_is_full_while_a_shard_arrives(
    tmp_path: Path, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: the cache of device b lies on a small disk of its own."""
    monkeypatch.setattr(Session, "local", property(lambda session: False))  # b has another disk
    a, b, client = (tmp_path / name for name in ("a", "b", "client"))
    pair_homes(client, a, b)
    model = str(shared_models / STORIES)
    options = LoadOptions(stages="a:0-1,b:1-5", exact=True, context=256)
    (device,) = local_devices(1, memory_bytes=1 << 30, processors=(), threads=1, pin=False)
    async with local_cluster([replace(device, home=a)]) as local:
        with small_disk(b, "600k", tmp_path) as node:
            addresses = [*local.addresses, node.address]
            async with Cluster.connect(addresses, home=client) as cluster:
                with pytest.raises(Exception, match="disk") as refused:
                    async with cluster.load(model, options):
                        pass
                assert getattr(refused.value, "exit_code", None) == 4
                assert getattr(refused.value, "device", None) == "b"
                print(refused.value)
                assert node.process.poll() is None
                whole = list((b / "cache").glob("shards/*.gguf"))
                assert whole == []
                # What fits is taken, and what came before the end counts.
                async with cluster.load(model, replace(options, stages="a:0-4,b:4-5")) as loaded:
                    few = await answer(loaded, "Once upon a time", greedy(10))
                node.grow("16m")
                async with cluster.load(model, options) as loaded:
                    assert (
                        await answer(loaded, "Once upon a time", greedy(10))
                    ).tokens == few.tokens


@dataclass
class DiskNode:
    """``edgellm join`` whose cache is on a file system that it alone sees."""

    process: subprocess.Popen[bytes]
    address: str
    cache: Path

    def grow(self, size: str) -> None:
        subprocess.run(
            ["nsenter", "-t", str(self.process.pid), "-m", "mount", "-o", f"remount,size={size}",
             str(self.cache)],
            check=True, timeout=20,
        )  # fmt: skip


@contextlib.contextmanager
def small_disk(home: Path, size: str, folder: Path) -> Iterator[DiskNode]:
    cache = home / "cache"
    cache.mkdir(parents=True)
    mount = f'mount -t tmpfs -o size={size} tmpfs "$1" && shift && exec "$@"'
    command = [
        "unshare", "-m", "sh", "-c", mount, "sh", str(cache),
        sys.executable, "-m", "edgellm", "join", "--json", "--name", "b", "--home", str(home),
        "--memory", "1GiB", "--threads", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment(folder),
        cwd=folder,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield DiskNode(process, json.loads(process.stdout.readline())["address"], cache)
    finally:
        end_tree(process.pid)
        process.communicate()


# --- a wrong clock --------------------------------------------------------------------

CLOCK = """
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <stdlib.h>
    #include <sys/time.h>
    #include <time.h>
    #include <unistd.h>
    #include <sys/syscall.h>

    static long off(void) { const char *t = getenv("CLOCK_OFF_S"); return t ? atol(t) : 0; }

    int clock_gettime(clockid_t id, struct timespec *at) {
        int made = syscall(SYS_clock_gettime, id, at);
        if (!made && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += off();
        return made;
    }

    time_t time(time_t *at) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        if (at) *at = now.tv_sec;
        return now.tv_sec;
    }

    int gettimeofday(struct timeval *at, void *zone) {
        struct timespec now;
        (void) zone;
        clock_gettime(CLOCK_REALTIME, &now);
        at->tv_sec = now.tv_sec;
        at->tv_usec = now.tv_nsec / 1000;
        return 0;
    }
"""
DAY_S = 86_400


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that sets a process's clock off by CLOCK_OFF_S seconds, for OpenSSL as well."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(textwrap.dedent(CLOCK), encoding="utf-8")
    made = folder / "clock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(folder / "clock.c")],
        check=True, timeout=60,
    )  # fmt: skip
    asked = [sys.executable, "-c", "import time; print(time.time())"]
    env = os.environ | {"LD_PRELOAD": str(made), "CLOCK_OFF_S": str(-DAY_S)}
    shown = subprocess.run(asked, env=env, check=True, capture_output=True, text=True, timeout=60)
    assert float(shown.stdout) == pytest.approx(time.time() - DAY_S, abs=30)
    return made


@pytest.mark.parametrize(
    "off_s",
    [
        pytest.param(DAY_S, id="a day ahead"),
        pytest.param(-DAY_S, id="a day behind", marks=pytest.mark.slow),
        pytest.param(-40 * 365 * DAY_S, id="forty years behind", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_clock_has_no_effect(off_s: int, wrong_clock: Path, tmp_path: Path) -> None:
    """A device whose clock is off by a day, or was never set: it pairs, computes, and stays."""
    env = {"LD_PRELOAD": str(wrong_clock), "CLOCK_OFF_S": str(off_s)}
    with joined(tmp_path, "kitchen", {}) as kitchen:
        code = str(json.loads(kitchen.out.read_bytes())["code"])
        with joined(tmp_path, "attic", env, "--code", code, "--peer", kitchen.address) as attic:
            wait_for(lambda: "Found device attic" in kitchen.said())
            process = start(
                ["chat", "--home", str(tmp_path / "kitchen"), "--json", "--exact",
                 "--model", "stub:6:delay=0.02", "--stages", "kitchen:0-3,attic:3-6",
                 "--peer", attic.address, "--prompt", "Hello", "--max-tokens", "150"],
                tmp_path,
            )  # fmt: skip
            ended = finish(process)
            assert ended.code == 0, ended.err
            assert len(ended.json["tokens"]) == 150
            assert ended.json["recoveries"] == []
            for side in (kitchen, attic):
                assert "does not answer" not in side.said()
                assert "Lost device" not in side.said()


@dataclass
class Joined:
    """A node that runs, and what it has said."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def address(self) -> str:
        return str(json.loads(self.out.read_bytes())["address"])

    def said(self) -> str:
        return self.err.read_text(encoding="utf-8")


@contextlib.contextmanager
def joined(folder: Path, home: str, env: dict[str, str], *options: str) -> Iterator[Joined]:
    """``edgellm join`` with a home below ``folder``, until the end of the block."""
    count = len(list(folder.glob(f"{home}.*.out")))
    out, err = folder / f"{home}.{count}.out", folder / f"{home}.{count}.err"
    command = [
        sys.executable, "-m", "edgellm", "join", "--json", "--home", str(folder / home),
        *(() if "--name" in options else ("--name", home)), *options,
    ]  # fmt: skip
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
            env=environment(folder) | env, cwd=folder,
        )  # fmt: skip
    made = Joined(process, out, err)
    try:
        wait_for(lambda: process.poll() is not None or out.read_bytes().endswith(b"\n"))
        assert process.poll() is None, made.said()
        yield made
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            end_tree(process.pid)
        process.wait()
        assert "Traceback" not in made.said(), made.said()


# --- copied and claimed identities ----------------------------------------------------


def test_of_a_device_and_its_copy_the_newer_start_wins(tmp_path: Path) -> None:
    """A home that was copied while its node ran: the same key, started elsewhere."""
    pair_homes(tmp_path / "watcher", tmp_path / "twin")
    with (
        joined(tmp_path, "watcher", {}) as watcher,
        joined(tmp_path, "twin", {}, "--peer", watcher.address) as first,
    ):
        wait_for(lambda: "Found device twin" in watcher.said())
        shutil.copytree(tmp_path / "twin", tmp_path / "copy")
        options = ("--name", "twin", "--peer", watcher.address)
        with joined(tmp_path, "copy", {}, *options) as copy:
            wait_for(
                lambda: "Refused an older run of device twin, or a copy of it" in watcher.said()
            )
            wait_for(lambda: f"Found device twin at {copy.address}" in watcher.said())
            arguments = ["devices", "--home", str(tmp_path / "watcher"), "--json", "--discovery"]
            ended = finish(start(arguments, tmp_path))
            assert ended.code == 0, ended.err
            (twin,) = [each for each in ended.json["devices"] if each["name"] == "twin"]
            assert (twin["state"], twin["address"]) == ("alive", copy.address)
            assert copy.said().count("Lost device") == 0
            assert first.process.poll() is None


def test_a_device_that_is_not_paired_is_refused_and_both_sides_say_so(tmp_path: Path) -> None:
    """It has a cluster of its own, and knows the address."""
    with joined(tmp_path, "node", {}) as node, joined(tmp_path, "stranger", {}) as stranger:
        for asked in (["devices"], ["chat", "--model", "stub:4", "--prompt", "Hello"]):
            home = ["--home", str(tmp_path / "stranger")]
            process = start([*asked, *home, "--peer", node.address, "--json"], tmp_path)
            error = told(finish(process), 4, node.address, "edgellm invite")
            assert error["code"] == "not_paired"
        wait_for(lambda: "not paired" in node.said())
        assert "Found device" not in node.said() + stranger.said()


class Silent:
    """Takes what comes."""

    def on_frame(self, session: Session, frame: Frame) -> None:
        del session, frame

    def on_message(self, session: Session, message: Message, frame: Frame) -> None:
        del session, message, frame

    def on_session_closed(self, session: Session) -> None:
        del session


async def test_a_paired_device_that_claims_another_ones_id_is_refused(tmp_path: Path) -> None:
    """What a greeting says does not count against the key that the connection was made with."""
    pair_homes(*(tmp_path / name for name in ("node", "other", "liar")))
    other = load_identity(tmp_path / "other").device_id
    with joined(tmp_path, "node", {}) as node:
        host, port = node.address.split(":")
        transport = SecureTransport(credentials_of(TrustStore(tmp_path / "liar")))
        honest = Introduction("liar", load_identity(tmp_path / "liar").device_id, "test")
        session = await Session.dial(transport, host, int(port), honest, Silent())
        await session.close()
        lie = replace(honest, name="other", device_id=other, boot=1 << 40)
        with pytest.raises(PeerLostError):
            session = await Session.dial(transport, host, int(port), lie, Silent())
            ended = asyncio.Event()
            session.on_close(lambda reason: ended.set())
            async with asyncio.timeout(5.0):
                await ended.wait()
            raise PeerLostError(session.reason)
        # The real one is not kept out by what was claimed in its name.
        with joined(tmp_path, "other", {}, "--peer", node.address):
            wait_for(lambda: "Found device other" in node.said())


# --- garbage, flipped bytes, wrong codes ----------------------------------------------


async def test_a_thousand_garbage_connections(start_cluster: StartCluster) -> None:
    """Half of them from a paired device. The node closes each, and goes on as before."""
    devices = local_devices(1, memory_bytes=1 << 30, processors=(), threads=1, pin=False)
    async with local_cluster(devices) as local:
        assaults = await garbage_into_node(local, 1000, seed=4)
        for assault in assaults:
            print(assault.to_dict())
        assert sum(assault.tries for assault in assaults) == 1000
        for assault in assaults:
            # Within 100 ms each: some are allowed to the scheduler of a busy machine.
            assert assault.repelled >= 0.95 * assault.tries
            assert assault.worst_s < LOADED_S
            assert assault.more_bytes <= MORE_MEMORY_BYTES
        async with (
            Cluster.connect(local.addresses, home=local.home) as cluster,
            cluster.load("stub:4", LoadOptions(context=256)) as model,
        ):
            assert len((await answer(model, PROMPT, greedy(20))).tokens) == 20


async def test_fifty_flipped_bytes(demo_model: Path) -> None:
    assault = await flipped_bytes(read_card(str(demo_model)).model, 50, seed=4)
    assert (assault.tries, assault.repelled) == (50, 50)


def test_a_hundred_wrong_codes() -> None:
    assault = wrong_codes(100, seed=4, tell=lambda line: None)
    assert assault.tries >= 100
    assert assault.repelled == assault.tries


# --- memory for one request too many --------------------------------------------------


async def test_a_request_without_room_is_refused_and_the_others_finish(
    start_cluster: StartCluster,
) -> None:
    """Room for two sequences: a third that cannot wait, and one that can never fit, are refused."""
    options = LoadOptions(stages="a:0-3,b:3-6", exact=True, context=128, sequences=2)
    async with start_cluster(2) as (cluster, _), cluster.load(SLOW, options) as model:
        expected = await answer(model, PROMPT, greedy(30))
        others = [asyncio.create_task(answer(model, PROMPT, greedy(30))) for _ in range(2)]
        await asyncio.sleep(0.3)
        with pytest.raises(UsageError, match="128"):
            await answer(model, PROMPT * 20, greedy(10))
        with pytest.raises(DeadlineError) as late:
            await answer(model, PROMPT, replace(greedy(10), deadline_s=0.3))
        assert late.value.exit_code == 4
        for made in await asyncio.gather(*others):
            same_tokens(made.tokens, expected.tokens)
        same_tokens((await answer(model, PROMPT, greedy(30))).tokens, expected.tokens)


def same_tokens(made: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert list(made) == list(expected)
