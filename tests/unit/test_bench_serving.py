"""The bench of serving: rates, targets, agreement, and how llama.cpp's server is listened to."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from edgellm.bench.agreement import Agreement, agreement, told
from edgellm.bench.llamaserver import LlamaServer, Served
from edgellm.bench.serving import Round, ServingReport, rate
from edgellm.cli.benchtables import serving_table
from edgellm.errors import DeviceError, UsageError
from edgellm.types import DeviceId, Epoch, LayerSpan, Plan, Stage

PLAN = Plan(
    Epoch(1),
    22,
    (
        Stage("a", DeviceId("a" * 64), LayerSpan(0, 12), 1),
        Stage("b", DeviceId("b" * 64), LayerSpan(12, 22), 1),
    ),
)


def test_a_rate_is_of_the_time_in_which_all_streams_run() -> None:
    # 10 tokens a second from 0 on, and 5 from 2 on; the first one ends at 6
    one = Served(tuple(at / 10 for at in range(61)), tuple(range(1, 62)))
    other = Served(tuple(2 + at / 5 for at in range(41)), tuple(range(1, 42)))
    assert rate([one, other]) == pytest.approx(15)
    # what a server holds back for a while counts when it was made, as far as one can tell
    lumps = Served(one.times[::7], one.counts[::7])
    assert rate([lumps, other]) == pytest.approx(15)
    with pytest.raises(UsageError, match="never ran at the same time"):
        rate([Served((0.0, 1.0), (1, 2)), Served((2.0, 3.0), (1, 2))])


def report(rpc: float | None, no_rpc: str = "") -> ServingReport:
    rounds = tuple(
        Round({1: 0.03 * slow, 4: 0.1 * slow, 8: 0.2 * slow}, 72 / slow, rpc and rpc / slow)
        for slow in (1.0, 1.1, 10.0)  # the machine drifts; what is compared drifts with it
    )
    agreements = (Agreement(64, 64, None), Agreement(64, 10, 0.02))
    return ServingReport(rounds, PLAN, no_rpc, (0.9, 0.8), agreements)


def test_targets_are_medians_of_ratios_of_one_round() -> None:
    done = report(50.0)
    ideal, batch, rpc = done.targets
    assert (ideal.ratio, batch.ratio, rpc.ratio) == pytest.approx((0.9, 1.8, 1.44))
    assert ideal.met and batch.met and rpc.met
    told = done.to_dict()
    assert [each["met"] for each in told["targets"]] == [True] * 3
    assert told["agreement"] == {
        "answers": 2, "tokens": 128, "agreed": 74, "differ": 1, "largest_gap": 0.02,
    }  # fmt: skip
    text = serving_table(done)
    assert "33.0 of 1, 110.0 of 4, 220.0 of 8" in text
    assert "NOT MET" not in text
    assert "74 of 128 tokens are those of each answer alone" in text


def test_a_server_that_could_not_be_built_is_said_and_the_rest_is_told() -> None:
    done = report(None, "there is no compiler.")
    assert len(done.targets) == 2
    text = serving_table(done)
    assert "llama-server over RPC was not measured: there is no compiler." in text
    assert done.to_dict()["tokens_per_s"]["rpc"] is None


def test_agreement_ends_at_the_first_token_that_differs() -> None:
    logits = [np.array([0.0, 1.0, 3.0, 2.5], np.float32)] * 3
    assert agreement([2, 2, 2], logits, [2, 2, 2]) == Agreement(3, 3, None)
    assert agreement([2, 2, 2], logits, [2, 3, 2]) == Agreement(3, 1, 0.5)
    assert told([Agreement(3, 3, None)])["largest_gap"] is None


async def test_a_stream_of_llama_server_is_read_as_it_comes() -> None:
    asked: list[bytes] = []
    status = b"200 OK"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(head + await reader.readexactly(length))
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Type: text/event-stream\r\n\r\n")
        for count in (1, 2, 4):
            event = {"content": "x", "stop": False, "tokens_predicted": count}
            writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await writer.drain()
        writer.write(b'data: {"stop": true, "tokens_predicted": 4}\n\n')
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        server = LlamaServer(listening.sockets[0].getsockname()[1])
        stream = await server.stream([5, 6], 4)
        assert stream.counts == (1, 2, 4)
        assert list(stream.times) == sorted(stream.times)
        body = json.loads(asked[0].split(b"\r\n\r\n", 1)[1])
        assert (body["prompt"], body["n_predict"]) == ([5, 6], 4)
        assert body["temperature"] == 0.0 and body["ignore_eos"]
        assert await server.ready()
        status = b"503 Service Unavailable"  # while it loads
        assert not await server.ready()
        with pytest.raises(DeviceError, match="answered '503'"):
            await server.stream([5], 2)
    assert not await server.ready()
