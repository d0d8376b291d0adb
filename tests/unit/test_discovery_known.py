"""The file of last-known devices: whole or not there, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.discovery.base import How, Sighting
from edgellm.discovery.known import FILE, MAX_FILE_BYTES, MAX_REMEMBERED, KnownDevices, parse_known

A = Sighting("a" * 64, "kitchen", (("10.0.0.1", 1), ("fe80::1%eth0", 2)), How.KNOWN)
B = Sighting("b" * 64, "å", (("10.0.0.2", 2),), How.KNOWN)


async def test_who_was_saved_is_seen_again(tmp_path: Path) -> None:
    KnownDevices(tmp_path).save([A, B])
    seen: list[Sighting] = []
    await KnownDevices(tmp_path).start(seen.append)
    assert seen == [A, B]


def test_the_file_stays_small(tmp_path: Path) -> None:
    many = [Sighting(f"{n:064x}", "x" * 64, A.addresses * 8, How.KNOWN) for n in range(1000)]
    known = KnownDevices(tmp_path)
    known.save(many)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert len(known.load()) == MAX_REMEMBERED
    assert (tmp_path / FILE).stat().st_size < MAX_FILE_BYTES


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"devices": 3}',
        b'{"devices": [3, null, [], {}, {"id": 1}]}', b'{"devices": [' + b"9" * 10_000 + b"]}",
        b" " * (MAX_FILE_BYTES + 1),
    ],
)  # fmt: skip
def test_a_damaged_file_knows_nobody(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert KnownDevices(tmp_path).load() == ()


def test_a_home_that_is_gone_only_forgets(tmp_path: Path) -> None:
    known = KnownDevices(tmp_path / "gone")
    known.save([A])
    assert known.load() == ()


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["id", "name", "addresses", "devices"]) | st.text(), inner, max_size=4
    ),
    max_leaves=20,
)  # fmt: skip
entries = st.fixed_dictionaries(
    {"id": json_values | st.just("a" * 64), "name": json_values, "addresses": json_values
     | st.just([["10.0.0.1", 1], ["x", 2]])}
)  # fmt: skip


@given(json_values | st.fixed_dictionaries({"devices": st.lists(entries, max_size=5)}))
def test_any_json_gives_sound_sightings_or_none(content: Any) -> None:
    for sighting in parse_known(content):
        assert len(sighting.device_id) == 64
        assert sighting.addresses
        json.dumps([sighting.name, sighting.addresses])
