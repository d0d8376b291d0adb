"""The trust store: what is written stays, several processes agree, and who is out is out."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgellm.errors import DeviceError, PairingError, UsageError
from edgellm.identity import files
from edgellm.identity.device import Identity, identity_folder, make_identity
from edgellm.identity.members import MAX_MEMBERS, Member, Members
from edgellm.identity.trust import FILE, TrustStore
from tests.pairs import device, founder


def add(store: TrustStore, name: str = "bert") -> Identity:
    made = make_identity()
    store.add(made.device_id, name, made.certificate)
    return made


def path_of(home: Path) -> Path:
    return identity_folder(home) / FILE


def test_a_device_without_a_cluster_trusts_itself_only(tmp_path: Path) -> None:
    store = TrustStore(tmp_path)
    assert store.cluster_id == ""
    assert len(store.members) == 0
    assert store.trusted(store.identity.device_id)
    assert not store.trusted(make_identity().device_id)
    assert store.certificates() == {store.identity.device_id: store.identity.certificate}
    assert not path_of(tmp_path).exists()
    stranger = make_identity()
    record = Member(stranger.device_id, "bert", stranger.certificate)
    with pytest.raises(PairingError):
        store.add(stranger.device_id, "bert", stranger.certificate)
    with pytest.raises(PairingError):
        store.merge([record])
    assert not store.trusted(stranger.device_id)


def test_founding_happens_once(tmp_path: Path) -> None:
    store = TrustStore(tmp_path)
    cluster = store.found("anna")
    assert store.found("anna") == cluster
    assert TrustStore(tmp_path).found("other") == cluster
    assert [m.name for m in store.members] == ["anna"]
    assert not store.settled
    assert stat.S_IMODE(path_of(tmp_path).stat().st_mode) == 0o600


def test_added_forgotten_and_added_again(tmp_path: Path) -> None:
    store = founder(tmp_path)
    bert = add(store)
    assert store.trusted(bert.device_id)
    assert store.settled
    assert store.forget(bert.device_id).version == 2
    assert not store.trusted(bert.device_id)
    assert bert.device_id not in store.certificates()
    assert not store.settled
    assert store.forget(bert.device_id).version == 2  # twice is once
    again = store.add(bert.device_id, "bert", bert.certificate)
    assert (again.version, again.forgotten) == (3, False)
    assert store.add(bert.device_id, "bert", bert.certificate, above=9).version == 10
    reread = TrustStore(tmp_path)
    assert reread.members == store.members
    assert reread.trusted(bert.device_id)


def test_an_old_record_does_not_bring_a_forgotten_device_back(tmp_path: Path) -> None:
    store = founder(tmp_path)
    bert = add(store)
    old = tuple(store.members)
    store.forget(bert.device_id)
    assert not store.merge(old)
    assert not store.trusted(bert.device_id)


def test_what_cannot_be_forgotten(tmp_path: Path) -> None:
    store = founder(tmp_path)
    with pytest.raises(UsageError):
        store.forget(store.identity.device_id)
    with pytest.raises(UsageError):
        store.forget(make_identity().device_id)


def test_a_command_and_its_node_see_each_others_changes(tmp_path: Path) -> None:
    node = founder(tmp_path)
    command = TrustStore(tmp_path)
    told: list[str] = []
    remove = node.on_change(lambda: told.append("node"))
    bert = add(command)
    assert not node.trusted(bert.device_id)  # not yet
    assert node.refresh()
    assert node.trusted(bert.device_id)
    assert told == ["node"]
    assert not node.refresh()
    carla = add(node, "carla")  # a change builds on what is on disk, not on what was read once
    assert told == ["node", "node"]
    command.forget(bert.device_id)
    assert command.trusted(carla.device_id)
    assert node.refresh()
    assert not node.trusted(bert.device_id)
    remove()
    remove()
    add(node, "dora")
    assert len(told) == 3


def test_a_listener_may_ask(tmp_path: Path) -> None:
    store = founder(tmp_path)
    seen: list[int] = []
    store.on_change(lambda: seen.append(len(store.certificates())))
    add(store)
    assert seen == [2]


def test_merging_what_is_known_touches_nothing(tmp_path: Path) -> None:
    store = founder(tmp_path)
    add(store)
    before = path_of(tmp_path).stat()
    store.on_change(lambda: pytest.fail("nothing changed"))
    assert not store.merge(tuple(store.members))
    after = path_of(tmp_path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    founder(tmp_path)
    made = [make_identity() for _ in range(24)]

    def work(part: list[Identity]) -> None:
        store = TrustStore(tmp_path)
        for each in part:
            store.add(each.device_id, "x", each.certificate)

    threads = [threading.Thread(target=work, args=(made[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = TrustStore(tmp_path)
    assert all(store.trusted(each.device_id) for each in made)


_HOLDS = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_writer_waits_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = founder(tmp_path)
    bert = make_identity()
    lock = identity_folder(tmp_path) / files.LOCK_FILE
    monkeypatch.setattr(files, "_LOCK_WAIT_S", 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DeviceError, match="another process"):
            store.add(bert.device_id, "bert", bert.certificate)
        assert not store.trusted(bert.device_id)
        assert not TrustStore(tmp_path, store.identity).trusted(bert.device_id)  # reading goes on
        holder.stdin.close()
        holder.wait()
    store.add(bert.device_id, "bert", bert.certificate)  # a process that died holds nothing


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = founder(tmp_path)
    before = path_of(tmp_path).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        store.on_change(lambda: pytest.fail("nothing changed"))
        bert = make_identity()
        with pytest.raises(DeviceError, match="No space left"):
            store.add(bert.device_id, "bert", bert.certificate)
    assert not store.trusted(bert.device_id)
    assert path_of(tmp_path).read_bytes() == before
    assert not [p for p in identity_folder(tmp_path).iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b"[" * 100000,
        b'{"format": 1, "cluster_id": "", "members": []}',
        b'{"format": 1, "cluster_id": "' + b"0" * 32 + b'", "members": [{}]}',
        bytes(2 << 20),
    ],
)
def test_a_damaged_file_is_said(tmp_path: Path, damage: bytes) -> None:
    store = founder(tmp_path)
    bert = add(store)
    path_of(tmp_path).write_bytes(damage)
    with pytest.raises(DeviceError, match="damaged"):
        TrustStore(tmp_path)
    with pytest.raises(DeviceError, match="damaged"):
        store.refresh()
    assert store.trusted(bert.device_id)  # a running node goes on with what it knew
    with pytest.raises(DeviceError, match="damaged"):
        add(store)  # and overwrites nothing
    assert path_of(tmp_path).read_bytes() == damage


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    founder(tmp_path)
    path_of(tmp_path).chmod(0o622)
    with pytest.raises(DeviceError, match="open to other users"):
        TrustStore(tmp_path)


def test_a_removed_file_means_no_cluster(tmp_path: Path) -> None:
    store = founder(tmp_path)
    bert = add(store)
    path_of(tmp_path).unlink()
    assert store.refresh()
    assert store.cluster_id == ""
    assert not store.trusted(bert.device_id)
    assert not store.refresh()


def with_me(home: Path, me: Identity) -> tuple[str, Members]:
    """Another cluster that has let this device in."""
    other = founder(home, "zoe")
    other.add(me.device_id, "anna", me.certificate)
    return other.cluster_id, other.members


def test_adopting_a_cluster(tmp_path: Path) -> None:
    alone = founder(tmp_path / "a")
    cluster, members = with_me(tmp_path / "b", alone.identity)
    alone.adopt(cluster, members)
    assert (alone.cluster_id, alone.members) == (cluster, members)
    assert TrustStore(tmp_path / "a").cluster_id == cluster


def test_a_device_with_others_adopts_no_other_cluster(tmp_path: Path) -> None:
    store = founder(tmp_path / "a")
    bert = add(store)
    before = store.members
    cluster, members = with_me(tmp_path / "b", store.identity)
    with pytest.raises(PairingError, match="another cluster"):
        store.adopt(cluster, members)
    assert store.members == before
    store.forget(bert.device_id)
    store.adopt(cluster, members)  # alone again, it may


def test_who_was_forgotten_by_its_cluster_may_adopt_another(tmp_path: Path) -> None:
    store = founder(tmp_path / "a")
    add(store)
    own = store.identity
    store.merge([Member(own.device_id, "anna", own.certificate, 2, True)])
    assert store.expelled
    assert not store.settled
    store.adopt(*with_me(tmp_path / "b", own))
    assert not store.expelled


def test_a_cluster_without_us_is_not_adopted(tmp_path: Path) -> None:
    store = device(tmp_path / "a")
    other = founder(tmp_path / "b")
    with pytest.raises(PairingError):
        store.adopt(other.cluster_id, other.members)
    with pytest.raises(PairingError):
        store.adopt("x", with_me(tmp_path / "c", store.identity)[1])
    assert store.cluster_id == ""


def test_adopting_the_own_cluster_again_brings_back_both(tmp_path: Path) -> None:
    """We had forgotten the inviter, and heard that we are forgotten; then a person paired us."""
    store = founder(tmp_path)
    bert = add(store)
    told = store.members
    carla = add(store, "carla")
    own = store.identity
    store.forget(bert.device_id)
    store.merge([Member(own.device_id, "anna", own.certificate, 5, True)])
    store.adopt(store.cluster_id, told, introducer=bert.device_id)
    assert store.trusted(bert.device_id)
    assert not store.expelled
    assert store.trusted(carla.device_id)  # unknown there, kept here


def test_a_full_cluster_lets_nobody_in(tmp_path: Path) -> None:
    store = founder(tmp_path)
    tombstones = [Member(f"{i:064x}", "x", b"", 1, True) for i in range(MAX_MEMBERS - 1)]
    store.merge(tombstones)
    assert len(TrustStore(tmp_path).members) == MAX_MEMBERS
    with pytest.raises(PairingError, match="at most"):
        add(store)
