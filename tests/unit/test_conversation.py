"""What was said and typed: turns into prompts, lines into messages, the file of what was typed."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from edgellm.cli import history
from edgellm.cli.answers import harmless
from edgellm.cli.history import History
from edgellm.cli.typed import Message
from edgellm.conversation import Conversation

# --- conversation ---------------------------------------------------------------------


def test_turns_become_chat_messages_with_the_system_message_first() -> None:
    said = Conversation(templated=True, system="Be brief.")
    said.add("one", "1")
    assert said.prompt("two") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]


def test_without_a_template_the_text_of_everything_is_continued() -> None:
    said = Conversation(templated=False, system="A play.")
    said.add("Once", " upon a time")
    assert said.prompt("Then") == "A play.\nOnce upon a time\nThen"


def test_the_oldest_turn_is_dropped_first_and_the_system_message_never() -> None:
    said = Conversation(templated=True, system="S")
    for number in range(2):
        said.add(f"q{number}", f"a{number}")
    assert said.drop_oldest()
    assert [message["content"] for message in said.prompt("?")] == ["S", "q1", "a1", "?"]  # type: ignore[index]
    assert said.drop_oldest()
    assert not said.drop_oldest()
    assert len(said.prompt("?")) == 2


def test_cleared_is_as_new() -> None:
    said = Conversation(templated=True)
    said.add("q", "a")
    said.clear()
    assert said.prompt("?") == [{"role": "user", "content": "?"}]


# --- lines into messages --------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "hello"),
        ([""], ""),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (['"""', "a", "", "b\\", '"""'], "a\n\nb\\"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
        (['  """a', 'b"""  '], "a\nb"),
        (['""""""'], ""),
        (['say """ aloud'], 'say """ aloud'),
        (["a\\", '"""'], 'a\n"""'),
    ],
)
def test_lines_become_one_message(lines: list[str], message: str) -> None:
    reader = Message()
    for line in lines[:-1]:
        assert reader.feed(line) is None
        assert reader.begun
    assert reader.feed(lines[-1]) == message
    assert not reader.begun


def test_a_message_that_is_dropped_leaves_nothing() -> None:
    reader = Message()
    reader.feed('"""a')
    reader.drop()
    assert not reader.begun
    assert reader.feed("b") == "b"


def test_a_message_without_its_end_is_still_there() -> None:
    reader = Message()
    reader.feed("a\\")
    assert reader.rest() == "a"
    assert not reader.begun


# --- history --------------------------------------------------------------------------


def test_history_is_private_and_comes_back(tmp_path: Path) -> None:
    first = History(tmp_path / "home")
    assert [first.add(entry) for entry in ("a", "b\nc", "b\nc", "  ", "a")] == [
        True, True, False, False, True,
    ]  # fmt: skip
    path = tmp_path / "home" / history.FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert History(tmp_path / "home").entries == ["a", "b\nc", "a"]


def test_history_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / history.FILE_NAME
    count = 2 * history.MAX_ENTRIES + 1
    path.write_text("".join(json.dumps(f"entry {at}") + "\n" for at in range(count)))
    kept = History(tmp_path).entries
    assert len(kept) == history.MAX_ENTRIES
    assert kept[-1] == f"entry {count - 1}"
    assert len(path.read_text().splitlines()) == history.MAX_ENTRIES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_huge_history_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / history.FILE_NAME
    line = json.dumps("x" * 5000) + "\n"
    path.write_text(line * (2 * history.MAX_BYTES // len(line)) + '"last"\n')
    assert History(tmp_path).entries[-1] == "last"
    assert path.stat().st_size <= history.MAX_BYTES


def test_a_history_that_is_no_history_is_left_out(tmp_path: Path) -> None:
    (tmp_path / history.FILE_NAME).write_bytes(b'"good"\n\xff\xfe\n{"a": 1}\n[[[\n"better"\n')
    assert History(tmp_path).entries == ["good", "better"]


def test_a_history_that_cannot_be_written_lasts_as_long_as_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = History(tmp_path / "file" / "home")
    assert kept.add("a")
    assert kept.entries == ["a"]


def test_a_long_message_is_not_kept(tmp_path: Path) -> None:
    assert not History(tmp_path).add("x" * (history.MAX_ENTRY + 1))
    assert History(None).add("x")


# --- what reaches a terminal ----------------------------------------------------------


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert harmless("a\tb\nc é 世") == "a\tb\nc é 世"
    assert harmless("\x1b[2J\x9b1m\x07\r\x7f") == "\ufffd[2J\ufffd1m\ufffd\ufffd\ufffd"
