"""The fault bench's small part: what ``scripts/chaos`` does when it is told nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.bench.assaults import MORE_MEMORY_BYTES
from tests.cluster.processes import finish, start


@pytest.mark.timeout(300)
def test_nothing_is_lost_and_nobody_gets_in(tmp_path: Path) -> None:
    ended = finish(start(["chaos", "--json"], tmp_path), within_s=280)
    assert ended.code == 0, ended.err
    told = ended.json
    assert told["kills"] == 6
    assert (told["lost"], told["repeated"], told["changed"]) == (0, 0, 0)
    assert told["detect_s"]["p95"] > 0 and told["next_token_s"]["p95"] > 0
    for series in told["series"]:
        assert series["problems"] == []
        # A fault that struck nothing proves nothing.
        assert series["recovered"] == series["trials"], series["name"]
    assert {each["name"]: each["tries"] for each in told["assaults"]} == {
        "coordinator killed": 1,
        "garbage of strangers": 500,
        "garbage of a paired device": 500,
        "garbage frames, state machine": 1000,
        "flipped bytes": 50,
        "wrong codes": 100,
    }
    for each in told["assaults"]:
        assert each["repelled"] == each["tries"]
        assert each["more_bytes"] <= MORE_MEMORY_BYTES
        # Within 100 ms each: some are allowed to the scheduler of a busy machine.
        assert each["late"] <= 0.05 * each["tries"]
