"""Chats line by line: at a real pseudo-terminal, and through a pipe."""

from __future__ import annotations

import json
import re
import signal
import stat
import sys
from pathlib import Path

import pytest

from tests.cluster.processes import all_gone, descendants, stages_of, wait_for
from tests.cluster.terminal import CTRL_C, CTRL_D, UP, Terminal, chatting, piped
from tests.inline import stub_answer

if sys.platform == "win32":
    pytest.skip("needs pseudo-terminals", allow_module_level=True)
pytest.importorskip("readline", reason="without readline lines cannot be edited")

SLOW = ("chat", "--model", "stub:6:delay=0.01", "--temperature", "0", "--max-tokens", "3000")
PASTING_OFF = "\x1b[?2004l"
"""What readline writes at the end of a line."""
START_S = 0.15
"""Until the interpreter itself has started, which is before any line of ours."""


@pytest.fixture
def demo_chat(demo_model: Path) -> tuple[str, ...]:
    pytest.importorskip("llama_cpp", reason="the engine is not installed")
    return ("chat", "--model", str(demo_model), "--temperature", "0")


# --- at a terminal --------------------------------------------------------------------


def test_a_conversation_remembers_what_was_said(demo_chat: tuple[str, ...], tmp_path: Path) -> None:
    with chatting(*demo_chat, temp=tmp_path) as terminal:
        assert "Anna" in terminal.ask("My name is Anna.")
        assert "Your name is Anna" in terminal.ask("What is my name?")
        assert "Forgotten." in terminal.ask("/clear", until=">>> ")
        assert "Your name is Anna" not in terminal.ask("What is my name?")
        assert terminal.ask("/exit", until="/exit\r\n")
        assert terminal.ended() == 0
        assert terminal.settings == terminal.found


def test_stats_say_who_did_what(demo_chat: tuple[str, ...], tmp_path: Path) -> None:
    with chatting(*demo_chat, "--name", "desk", temp=tmp_path) as terminal:
        assert "no whole answer yet" in terminal.ask("/stats", until=">>> ")
        terminal.ask("What is 3 + 4?")
        told = terminal.ask("/stats", until=">>> ")
        assert re.search(r"desk +0 to 7 +\d+", told)
        assert "coordinator to desk" in told
        assert "tokens/s" in told
        assert "/clear" in terminal.ask("/help", until=">>> ")
        assert "There is no /foo" in terminal.ask("/foo", until=">>> ")


def test_stats_after_every_answer_where_asked_for(
    demo_chat: tuple[str, ...], tmp_path: Path
) -> None:
    with chatting(*demo_chat, "--stats", temp=tmp_path) as terminal:
        assert "messages" in terminal.ask("What is 3 + 4?", until="after it.\r\n>>> ")


def test_several_lines_are_one_message(tmp_path: Path) -> None:
    """The stub's prompt is as long as its text: 3 + 1 + 3 bytes."""
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "4", "--stats")
    with chatting(*stub, temp=tmp_path) as terminal:
        terminal.ask("one\\", until="... ")
        assert "7 tokens of prompt" in terminal.ask("two", until="after it.\r\n>>> ")
        terminal.ask("/clear", until=">>> ")
        terminal.ask('"""', until="... ")
        terminal.ask("a", until="... ")
        terminal.ask("", until="... ")
        assert "4 tokens of prompt" in terminal.ask('b"""', until="after it.\r\n>>> ")


def test_what_was_typed_can_be_had_again_in_the_next_chat(tmp_path: Path) -> None:
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "2")
    with chatting(*stub, temp=tmp_path) as terminal:
        terminal.ask("first")
        terminal.ask("second")
        terminal.send(CTRL_D)
        assert terminal.ended() == 0
    path = tmp_path / "home" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [json.loads(line) for line in path.read_text().splitlines()] == ["first", "second"]
    with chatting(*stub, temp=tmp_path) as terminal:
        terminal.send(UP + UP)
        terminal.expect("first")
        assert "2 tokens" in terminal.ask("")


def test_ctrl_c_stops_an_answer_and_nothing_else(tmp_path: Path) -> None:
    with chatting(*SLOW, temp=tmp_path) as terminal:
        stages = stages_of(terminal.process.pid)
        assert len(stages) == 1
        for _ in range(2):  # also the second time
            terminal.send("Once\r")
            terminal.expect("Once\r\n")
            wait_for(lambda: terminal.read_some() > 40)
            terminal.send(CTRL_C)
            terminal.expect("[stopped]\r\n>>> ")
        assert stages_of(terminal.process.pid) == stages
        assert "no whole answer yet" in terminal.ask("/stats", until=">>> ")
        terminal.send(CTRL_D)
        assert terminal.ended() == 0
        assert terminal.settings == terminal.found


def test_what_came_before_ctrl_c_belongs_to_the_conversation(tmp_path: Path) -> None:
    """Its text is in the next prompt, which with it leaves no room for an answer."""
    with chatting(*SLOW, "--ctx", "4000", temp=tmp_path) as terminal:
        terminal.send("Once\r")
        terminal.expect("Once\r\n")
        wait_for(lambda: terminal.read_some() > 40)
        terminal.send(CTRL_C)
        terminal.expect("[stopped]\r\n>>> ")
        terminal.send("x" * 2990 + "\r")
        terminal.expect("its oldest turns are left out")


def test_ctrl_c_at_the_prompt(tmp_path: Path) -> None:
    """It drops a line that has begun; at an empty prompt it ends the chat."""
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "4", "--stats")
    with chatting(*stub, temp=tmp_path) as terminal:
        terminal.send("never mind")
        terminal.expect("never mind")
        terminal.send(CTRL_C)
        terminal.expect(">>> ")
        assert "3 tokens of prompt" in terminal.ask("now", until="after it.\r\n>>> ")
        terminal.ask("one\\", until="... ")
        terminal.send(CTRL_C)  # drops the message, not only its second line
        terminal.expect(">>> ")
        below = descendants(terminal.process.pid)
        assert below
        terminal.send(CTRL_C)
        assert terminal.ended() == 130
        terminal.expect("Stopped.")
        assert terminal.settings == terminal.found
        wait_for(lambda: all_gone(below))


def test_answers_into_a_file(tmp_path: Path) -> None:
    """A person types, and what is said to people stays on the screen."""
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "20")
    out = tmp_path / "out"
    with Terminal(*stub, temp=tmp_path, out=out) as terminal:
        terminal.expect(">>> ")
        terminal.ask("Once upon a time")
        terminal.send(CTRL_C)
        assert terminal.ended() == 130
    assert (
        out.read_bytes()
        == bytes(stub_answer(list(b"Once upon a time"), 6, 20)).decode("utf-8", "replace").encode()
        + b"\n"
    )


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGTERM, "prompt"),
        (signal.SIGHUP, "prompt"),
        (signal.SIGINT, "prompt"),
        (signal.SIGTERM, "answer"),
        (signal.SIGHUP, "answer"),
    ],
)
def test_a_chat_that_is_told_to_end_puts_the_terminal_back(
    number: signal.Signals, when: str, tmp_path: Path
) -> None:
    with chatting(*SLOW, temp=tmp_path) as terminal:
        below = descendants(terminal.process.pid)
        assert below
        if when == "answer":
            terminal.send("Once\r")
            wait_for(lambda: terminal.read_some() > 40)
        terminal.process.send_signal(number)
        assert terminal.ended() == 130
        terminal.expect("Stopped.")
        assert "Traceback" not in terminal.screen
        assert terminal.settings == terminal.found
        wait_for(lambda: all_gone(below))


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.2, 0.3, 0.4, 0.6])
def test_ctrl_c_before_the_first_prompt(after_s: float, tmp_path: Path) -> None:
    """While modules are imported, the node starts, the stage loads."""
    with Terminal(*SLOW, temp=tmp_path) as terminal:
        terminal.wait(START_S + after_s)
        below = descendants(terminal.process.pid)
        terminal.send(CTRL_C)
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.screen
        wait_for(lambda: all_gone(below))


def test_an_answer_cannot_command_the_terminal(tmp_path: Path) -> None:
    """The stub's bytes are random; as they are they would move the cursor, or worse."""
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "600")
    with chatting(*stub, temp=tmp_path) as terminal:
        answer = terminal.ask("Once", until="\r\n[600 tokens")
        assert len(answer) > 300
        assert not set(answer.replace(PASTING_OFF, "")) & set(
            map(chr, (*range(9), 0x1B, 0x7F, 0x9B))
        )


def test_more_of_ctrl_c_does_not_disturb_the_end(tmp_path: Path) -> None:
    """An impatient person gets the same: code 130, and nothing left behind."""
    with Terminal(*SLOW, "--prompt", "Once", temp=tmp_path) as terminal:
        terminal.expect("Loaded in")
        wait_for(lambda: terminal.read_some() > 100)
        below = descendants(terminal.process.pid)
        assert below
        for _ in range(5):
            terminal.send(CTRL_C)
            terminal.wait(0.02)
        assert terminal.ended() == 130
        assert "Traceback" not in terminal.screen
        assert "Exception" not in terminal.screen
        wait_for(lambda: all_gone(below))


def test_a_demo_chats_over_its_devices(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the engine is not installed")
    arguments = ("demo", "--devices", "2", "--temperature", "0", "--stats")
    with chatting(*arguments, temp=tmp_path) as terminal:
        told = terminal.ask("What is edgellm?", until="after it.\r\n>>> ")
        assert "together they answer" in told
        assert "a to b" in told
        below = descendants(terminal.process.pid)
        terminal.send(CTRL_D)
        assert terminal.ended() == 0
        assert all_gone(below)
    assert list(tmp_path.iterdir()) == []


# --- through a pipe -------------------------------------------------------------------


def test_every_piped_line_is_a_turn(demo_chat: tuple[str, ...], tmp_path: Path) -> None:
    ended = piped("My name is Anna.\n\nWhat is my name?", *demo_chat, temp=tmp_path)
    assert ended.code == 0, ended.err
    first, second = ended.out.splitlines()
    assert "Anna" in first
    assert second == "Your name is Anna."
    assert ">>>" not in ended.err
    assert not (tmp_path / "home" / "chat_history").exists()


def test_oldest_turns_make_room_and_that_is_said_once(
    demo_chat: tuple[str, ...], tmp_path: Path
) -> None:
    lines = ["My name is Anna.", *["What is 3 + 4?"] * 6, "What is my name?"]
    ended = piped("\n".join(lines), *demo_chat, "--ctx", "100", temp=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.err.count("its oldest turns are left out") == 1
    answers = ended.out.splitlines()
    assert len(answers) == len(lines)
    assert "Anna" in answers[0]
    assert "Anna" not in answers[-1]


def test_a_message_that_cannot_fit_is_refused_and_the_chat_goes_on(tmp_path: Path) -> None:
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "5", "--ctx", "64")
    ended = piped("x" * 100 + "\nhello\n", *stub, temp=tmp_path)
    assert ended.code == 0, ended.err
    assert "the prompt has 100 tokens, the context holds 64" in ended.err
    assert "[5 tokens" in ended.err


def test_a_pipe_without_lines_has_no_prompt(tmp_path: Path) -> None:
    ended = piped("", "chat", "--model", "stub:6", temp=tmp_path)
    assert ended.code == 2
    assert "there is no prompt" in ended.err


def test_json_needs_a_prompt(tmp_path: Path) -> None:
    ended = piped("hello\n", "chat", "--model", "stub:6", "--json", temp=tmp_path)
    assert ended.code == 2
    assert ended.json["error"]["exit_code"] == 2


def test_a_system_message_reaches_a_template_that_takes_one(tmp_path: Path) -> None:
    """Without a template it begins the text: 2 + 1 + 3 bytes."""
    stub = ("chat", "--model", "stub:6", "--temperature", "0", "--max-tokens", "5")
    ended = piped("Hey\n", *stub, "--system", "Be", "--stats", temp=tmp_path)
    assert "6 tokens of prompt" in ended.err


def test_a_template_without_system_messages_is_told_of(
    demo_chat: tuple[str, ...], tmp_path: Path
) -> None:
    ended = piped("hello\n", *demo_chat, "--system", "Be brief.", temp=tmp_path)
    assert ended.code == 0
    assert "leaves system messages out" in ended.err
