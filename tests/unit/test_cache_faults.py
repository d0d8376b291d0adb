"""The cache under pressure: killed, out of room, on a full disk, and asked twice at once."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from edgellm.errors import DeviceError
from edgellm.modelfile import Model
from edgellm.modelfile.manifest import PIECE_BYTES
from edgellm.scheduler.transfer import Piece
from edgellm.store import disk, verify
from edgellm.store.assembly import Assembly
from edgellm.store.files import PARTIAL_KEPT_S
from edgellm.types import LayerSpan
from tests.tensors import (
    LAYERS,
    Case,
    fetch_all,
    files_below,
    open_cache,
    put,
)

# --- crashes --------------------------------------------------------------------------

KILLED = """
    import sys
    from pathlib import Path
    from edgellm.modelfile import open_model
    from edgellm.store.cache import ShardCache
    from edgellm.types import LayerSpan
    from tests.tensors import Peer, manifest_of

    home, model_path, digests, span = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    model = open_model(model_path)
    manifest, told = manifest_of(model, LayerSpan(*map(int, span.split("-"))), digests)
    cache = ShardCache(home, 1 << 30)
    cache.sweep()
    assembly = cache.assemble(manifest)
    peer = Peer(model, told)
    for piece in assembly.missing:
        assert assembly.write(piece, peer.read(piece))
        print(piece.length, flush=True)
    print("complete", flush=True)
    assembly.finish()
    sys.stdin.read()
"""


def run_until(home: Path, model: Model, digests: Path, lines: int, repository: Path) -> int:
    """Have another process fetch ``lines`` pieces, kill it with signal 9; the bytes it told."""
    script = home.parent / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), str(home), str(model.paths[0]), str(digests), "1-3"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    told = 0
    try:
        for _ in range(lines):
            line = process.stdout.readline()
            assert line, "the process ended by itself"
            told += int(line)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stdin.close()
    return told


@pytest.mark.parametrize("lines", [1, 9, 25])
def test_kill_9_in_the_middle(
    lines: int, case: Case, wide: Model, home: Path, digests_folder: Path, repository: Path
) -> None:
    told = run_until(home, wide, digests_folder, lines, repository)
    assert not list((home / "shards").iterdir())
    cache = open_cache(home)
    assembly = cache.assemble(case.manifest)
    assert assembly.resumed_bytes >= told  # what it told was journaled
    with fetch_all(assembly, case.peer) as held:
        assert held.path.read_bytes() == case.bytes
    assert case.peer.given_bytes == assembly.total_bytes - assembly.resumed_bytes
    assert case.peer.given_bytes <= assembly.total_bytes - told
    assert not list((home / "partial").iterdir())


def test_what_was_fetched_for_another_span_counts(
    case: Case, wide: Model, home: Path, digests_folder: Path, tmp_path: Path, repository: Path
) -> None:
    """Killed, and then the plan changes: pieces of the unfinished file are not fetched again."""
    run_until(home, wide, digests_folder, 25, repository)
    other = Case(wide, LayerSpan(1, 2), digests_folder, tmp_path)
    assembly = open_cache(home).assemble(other.manifest)
    assert assembly.local_bytes > 10 * PIECE_BYTES
    with fetch_all(assembly, other.peer) as held:
        assert held.path.read_bytes() == other.bytes


def interrupted(home: Path, case: Case, pieces: int = 12) -> Path:
    """An unfinished file with so many pieces; its path."""
    assembly = open_cache(home).assemble(case.manifest)
    for piece in assembly.missing[:pieces]:
        assert assembly.write(piece, case.peer.read(piece))
    assembly.close()
    case.peer.given.clear()
    (path,) = (home / "partial").glob("*.part")
    return path


def test_a_resume_trusts_no_journal(case: Case, home: Path) -> None:
    path = interrupted(home, case)
    with path.open("r+b") as file:
        file.seek(case.manifest.offsets[0] + 100)
        file.write(b"damage")
    journal = path.with_suffix(".journal")
    with journal.open("ab") as file:
        file.write(b"\x1e\x00\x00\x00\xff\xff\xff\xff\x01\x02\x03")  # never written; none; torn
    assembly = open_cache(home).assemble(case.manifest)
    lost = sum(piece.length for piece in assembly.missing if piece.index == 0)
    assert lost
    with fetch_all(assembly, case.peer) as held:
        assert held.path.read_bytes() == case.bytes
    assert case.peer.given_bytes + assembly.resumed_bytes == assembly.total_bytes
    assert assembly.resumed_bytes > 0


def test_a_resume_goes_on_after_a_torn_journal(case: Case, home: Path) -> None:
    journal = interrupted(home, case).with_suffix(".journal")
    with journal.open("ab") as file:
        file.write(b"\x01\x02")
    assembly = open_cache(home).assemble(case.manifest)
    for piece in assembly.missing[:5]:
        assert assembly.write(piece, case.peer.read(piece))
    had = assembly.resumed_bytes + assembly.fetched_bytes
    assembly.close()
    again = open_cache(home).assemble(case.manifest)
    assert again.resumed_bytes == had
    again.close()


def test_a_resume_without_its_journal_starts_again(case: Case, home: Path) -> None:
    interrupted(home, case).with_suffix(".journal").unlink()
    with fetch_all(open_cache(home).assemble(case.manifest), case.peer) as held:
        assert held.path.read_bytes() == case.bytes


def test_sweeping(case: Case, home: Path) -> None:
    path = interrupted(home, case)
    junk = [
        home / "shards" / f".{'a' * 64}.gguf.x1",
        home / "partial" / ".tmp",
        home / "partial" / f"{'b' * 64}.journal",  # of no file
        home / "shards" / f"{'c' * 64}.json",
    ]
    strange = home / "shards" / "notes.txt"
    for file in [*junk, strange]:
        file.write_bytes(b"x")
    cache = open_cache(home)
    assert not any(file.exists() for file in junk)
    assert strange.exists()  # not ours
    assert path.exists()
    cache.sweep(time.time() + PARTIAL_KEPT_S - 60)
    assert path.exists()
    cache.sweep(time.time() + PARTIAL_KEPT_S + 60)
    assert files_below(home) == {"shards/notes.txt"}


def test_sweeping_what_is_beyond_the_limit(case: Case, home: Path) -> None:
    interrupted(home, case)
    open_cache(home, limit=1000)
    assert files_below(home) == set()


# --- room -----------------------------------------------------------------------------


@pytest.fixture
def cases(wide: Model, digests_folder: Path, tmp_path: Path) -> list[Case]:
    """A case for every layer: nothing in common."""
    return [Case(wide, LayerSpan(i, i + 1), digests_folder, tmp_path) for i in range(LAYERS)]


def used_long_ago(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for file in (path, path.with_suffix(".json")):
        os.utime(file, (then, then))


def test_the_least_recently_used_goes_first(cases: list[Case], home: Path) -> None:
    size = max(len(case.bytes) for case in cases)
    cache = open_cache(home, limit=2 * size + 1000)
    paths = [put(cache, case) for case in cases[:2]]
    used_long_ago(paths[0], 100)
    used_long_ago(paths[1], 200)
    third = put(cache, cases[2])
    assert [path.exists() for path in (*paths, third)] == [True, False, True]
    assert cache.used_bytes <= 2 * size + 1000
    # to find a file is to use it
    used_long_ago(third, 50)
    held = cache.find(cases[0].manifest)
    assert held is not None
    held.release()
    put(cache, cases[1])
    assert paths[0].exists()
    assert not third.exists()
    assert not any(cache.holds(list(cases[2].manifest.tensors)))


def test_what_is_held_stays(cases: list[Case], home: Path) -> None:
    size = max(len(case.bytes) for case in cases)
    cache = open_cache(home, limit=2 * size + 1000)
    first = fetch_all(cache.assemble(cases[0].manifest), cases[0].peer)
    used_long_ago(first.path, 1000)
    second = put(cache, cases[1])
    put(cache, cases[2])
    assert first.path.exists()
    assert not second.exists()
    again = cache.find(cases[0].manifest)
    assert again is not None
    first.release()
    first.release()  # once more is nothing
    blocker = cache.find(cases[2].manifest)
    assert blocker is not None
    with pytest.raises(DeviceError, match="in use") as caught:
        cache.assemble(cases[3].manifest)
    assert "limit" in (caught.value.hint or "")
    assert again.path.read_bytes() == cases[0].bytes
    again.release()
    put(cache, cases[3])
    assert not first.path.exists()
    assert blocker.path.exists()


def test_a_file_larger_than_the_cache(case: Case, home: Path) -> None:
    cache = open_cache(home, limit=len(case.bytes) - 1)
    with pytest.raises(DeviceError, match="the cache may hold"):
        cache.assemble(case.manifest)
    assert files_below(home) == set()


def test_what_a_file_is_made_of_goes_after_it(
    case: Case, wide: Model, home: Path, digests_folder: Path, tmp_path: Path
) -> None:
    """A limit for one file and a bit: the earlier shard is the source of the next, then goes."""
    cache = open_cache(home, limit=len(case.bytes) + 1000)
    before = put(cache, case)
    used_long_ago(before, 100)
    other = Case(wide, LayerSpan(2, 3), digests_folder, tmp_path)
    assembly = cache.assemble(other.manifest)
    assert assembly.missing == ()
    with assembly.finish() as held:
        assert held.path.exists()
        assert not before.exists()
        assert cache.used_bytes <= len(case.bytes) + 1000


def fail_writes_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the ``count``-th on, writes say that the disk is full; [0] is how many there were."""
    calls = [0]
    write = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


def test_a_disk_that_fills_up_while_receiving(
    case: Case, cases: list[Case], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(home)
    other = put(cache, cases[3])
    assembly = cache.assemble(case.manifest)
    wanted = assembly.missing
    with monkeypatch.context() as patch:
        fail_writes_after(7, patch)
        with pytest.raises(DeviceError, match="disk is full") as caught:
            fetch_all(assembly, case.peer)
        assert "Free some space" in (caught.value.hint or "")
        assembly.close()
    assert len(assembly.missing) == len(wanted) - 7
    assert cache.find(cases[3].manifest) is not None
    assert [path.name for path in (home / "shards").glob("*.gguf")] == [other.name]
    case.peer.given.clear()
    assembly = cache.assemble(case.manifest)
    assert assembly.resumed_bytes
    assert assembly.missing == wanted[7:]
    with fetch_all(assembly, case.peer) as held:
        assert held.path.read_bytes() == case.bytes


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_before_anything_is_fetched(
    case: Case, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(home)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DeviceError, match="disk is full"):
            cache.assemble(case.manifest)
    assert files_below(home) == set()
    put(cache, case)


def test_a_full_disk_takes_old_files_first(
    cases: list[Case], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(home)
    old, older, held = (put(cache, case) for case in cases[:3])
    used_long_ago(old, 100)
    used_long_ago(older, 200)
    used_long_ago(held, 300)
    keep = cache.find(cases[2].manifest)
    assert keep is not None
    reserve = os.posix_fallocate

    def fallocate(descriptor: int, offset: int, nbytes: int) -> None:
        if older.exists():
            full()
        reserve(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    put(cache, cases[3])
    assert [path.exists() for path in (old, older, held)] == [True, False, True]


def test_an_old_file_that_cannot_be_removed(
    cases: list[Case], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next oldest goes; with none left, the full disk is told."""
    cache = open_cache(home)
    old, older = (put(cache, case) for case in cases[:2])
    used_long_ago(old, 100)
    used_long_ago(older, 200)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == older:
            raise PermissionError(errno.EACCES, "not allowed")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DeviceError, match="disk is full"):
        cache.assemble(cases[3].manifest)
    assert [path.exists() for path in (old, older)] == [False, True]
    held = cache.find(cases[1].manifest)
    assert held is not None
    held.release()


def test_a_good_file_is_found_on_a_full_disk(
    case: Case, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(open_cache(home), case)
    path.with_suffix(".json").unlink()
    cache = open_cache(home)
    monkeypatch.setattr(os, "fsync", full)
    held = cache.find(case.manifest)
    assert held is not None
    assert all(cache.holds(list(case.manifest.tensors)))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(
    call: str, case: Case, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(home)
    assembly = cache.assemble(case.manifest)
    with monkeypatch.context() as patch:
        patch.setattr(*((os, call, full) if call == "fsync" else (Path, "replace", full)))
        with pytest.raises(DeviceError, match="disk is full"):
            fetch_all(assembly, case.peer)
    assert not list((home / "shards").iterdir())
    case.peer.given.clear()
    put(cache, case)
    assert not case.peer.given


def test_without_preallocation(case: Case, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert put(open_cache(home), case).read_bytes() == case.bytes


# --- several at once ------------------------------------------------------------------


def test_two_that_want_the_same_file(case: Case, home: Path) -> None:
    """The second waits for the first, then shares its file."""
    cache = open_cache(home)
    first = cache.assemble(case.manifest)
    second: list[Assembly] = []
    thread = threading.Thread(target=lambda: second.append(cache.assemble(case.manifest)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    one = fetch_all(first, case.peer)
    thread.join(10)
    assert second[0].missing == ()
    two = second[0].finish()
    assert one.path == two.path
    assert case.peer.given_bytes == case.manifest.tensor_bytes


def test_one_that_gives_up_lets_the_next_go_on(case: Case, home: Path) -> None:
    cache = open_cache(home)
    first = cache.assemble(case.manifest)
    for piece in first.missing[:6]:
        first.write(piece, case.peer.read(piece))
    first.close()
    first.close()
    with pytest.raises(DeviceError, match="given up"):
        first.write(first.missing[0], case.peer.read(first.missing[0]))
    with pytest.raises(DeviceError, match="given up"):
        first.finish()
    second = cache.assemble(case.manifest)
    assert second.resumed_bytes == first.fetched_bytes
    fetch_all(second, case.peer).release()


def test_giving_up_while_waiting(case: Case, home: Path) -> None:
    cache = open_cache(home)
    first = cache.assemble(case.manifest)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(DeviceError, match="given up"):
        cache.assemble(case.manifest, cancel=cancel)
    fetch_all(first, case.peer).release()


def test_giving_up_while_copying(case: Case, wide: Model, home: Path) -> None:
    cache = open_cache(home)
    cancel = threading.Event()

    def progress(done: int, total: int) -> None:
        if done > total // 3:
            cancel.set()

    with pytest.raises(DeviceError, match="given up"):
        cache.assemble(case.manifest, [wide], progress, cancel)
    assembly = cache.assemble(case.manifest, [wide])
    assert 0 < assembly.resumed_bytes < assembly.total_bytes
    with assembly.finish() as held:
        assert held.path.read_bytes() == case.bytes


def test_pieces_from_several_threads(case: Case, home: Path) -> None:
    assembly = open_cache(home).assemble(case.manifest)
    pieces = list(assembly.missing)

    def work(mine: list[Piece]) -> None:
        for piece in mine:
            assert assembly.write(piece, case.peer.read(piece))

    shuffled = random.Random(1).sample(pieces, len(pieces))
    threads = [threading.Thread(target=work, args=(part,)) for part in (pieces, shuffled, pieces)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert assembly.fetched_bytes == assembly.total_bytes
    with assembly.finish() as held:
        assert held.path.read_bytes() == case.bytes


def test_closing_while_it_is_finished_leaves_nothing_held(
    case: Case, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(home)
    assembly = cache.assemble(case.manifest)
    for piece in assembly.missing:
        assembly.write(piece, case.peer.read(piece))
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        assembly.close()
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DeviceError, match="given up"):
            assembly.finish()
    held = cache.find(case.manifest)
    assert held is not None
    held.release()
    open_cache(home, limit=1000)
    assert files_below(home) == set()


def test_hashing_in_threads_stops_at_the_first_error() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        time.sleep(0.005)
        return item

    with pytest.raises(ValueError, match="three"):
        list(disk.in_threads(work, range(1000)))
    assert len(begun) < 100


def test_the_table_of_pieces(case: Case) -> None:
    table = verify.PieceTable(case.manifest)
    assert [table.number(piece) for piece in table.pieces] == list(range(len(table.pieces)))
