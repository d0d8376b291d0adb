"""Tool calls and thoughts out of streamed text: the same however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.api.errors import ApiError
from edgellm.api.fields import Fields
from edgellm.api.reasoning import ReasoningSplitter
from edgellm.api.tools import Calls, Toolset, read_tools
from edgellm.api.toolstream import CallArgued, CallBegan, Said, Syntax, ToolStream
from edgellm.api.toolsyntax import (
    LLAMA,
    MISTRAL,
    TAGGED,
    TOLD,
    answer_grammar,
    prompt_of,
    syntax_of,
)

pytestmark = pytest.mark.pure
NAMES = frozenset({"get_weather", "add"})
WEATHER = '{"name": "get_weather", "arguments": {"city": "Oslo {}\\"", "n": [1, 2]}}'
ADD = '{"name": "add", "arguments": {"a": 1}}'


def read(
    syntax: Syntax, pieces: list[str], *, parallel: bool = True
) -> tuple[str, list[tuple[str, str]]]:
    """(what is said, calls as name and arguments)."""
    ids = (f"id{number}" for number in itertools.count())
    stream = ToolStream(syntax, NAMES, lambda: next(ids), parallel=parallel)
    deltas = [delta for piece in pieces for delta in stream.feed(piece)] + stream.finish()
    said = "".join(delta.text for delta in deltas if isinstance(delta, Said))
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if isinstance(delta, CallBegan):
            assert (delta.index, delta.id) == (len(calls), f"id{len(calls)}")
            calls.append((delta.name, ""))
        elif isinstance(delta, CallArgued):
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    assert stream.calls == len(calls)
    return said, calls


def cut(text: str, at: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


CASES: list[tuple[Syntax, str, str, list[tuple[str, Any]]]] = [
    (TAGGED, "Just words, 1 < 2 <tool", "Just words, 1 < 2 <tool", []),
    (
        TAGGED,
        f"I look it up.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{ADD}</tool_call>\n",
        "I look it up.",
        [("get_weather", {"city": 'Oslo {}"', "n": [1, 2]}), ("add", {"a": 1})],
    ),
    (TAGGED, f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", {"a": 1})]),
    (  # arguments before the name, and as text
        TAGGED,
        '<tool_call>{"arguments": "{\\"a\\": 2}", "id": 7, "name": "add"}</tool_call>',
        "",
        [("add", {"a": 2})],
    ),
    (TAGGED, '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>', "", []),
    (TAGGED, "<tool_call>not json</tool_call> said", "", []),
    (LLAMA, '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (
        LLAMA,
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}',
        "",
        [("add", {"a": 1}), ("add", {})],
    ),
    (LLAMA, '{"colour": "red"}', '{"colour": "red"}', []),
    (LLAMA, "Well, {x}", "Well, {x}", []),
    (
        MISTRAL,
        f"[TOOL_CALLS] [{ADD}, {WEATHER}]",
        "",
        [("add", {"a": 1}), ("get_weather", {"city": 'Oslo {}"', "n": [1, 2]})],
    ),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1}', "", [("add", {"a": 1})]),
    (
        MISTRAL,
        'ok [TOOL_CALLS]add{"a": 1}[TOOL_CALLS]add{"a": 2}',
        "ok",
        [("add", {"a": 1}), ("add", {"a": 2})],
    ),
]


@pytest.mark.parametrize(("syntax", "text", "said", "calls"), CASES)
@settings(max_examples=25)
@given(at=st.lists(st.integers(0, 200), max_size=30))
def test_calls_are_read_however_the_text_is_cut(
    syntax: Syntax, text: str, said: str, calls: list[tuple[str, Any]], at: list[int]
) -> None:
    found, made = read(syntax, cut(text, at))
    assert [(name, json.loads(arguments)) for name, arguments in made] == calls
    if calls or said:
        assert found == said
    else:  # what is no call of ours is shown as it was written
        assert found == text


def test_arguments_come_as_they_are_written() -> None:
    stream = ToolStream(TAGGED, NAMES, lambda: "id")
    seen = [stream.feed(character) for character in f"<tool_call>{WEATHER}"]
    assert sum(any(isinstance(d, CallArgued) for d in each) for each in seen) > 20


def test_without_parallel_calls_the_first_one_ends_the_answer() -> None:
    stream = ToolStream(TAGGED, NAMES, lambda: "id", parallel=False)
    stream.feed(f"<tool_call>{ADD}")
    assert stream.closed
    assert stream.feed(f"</tool_call><tool_call>{ADD}</tool_call>") == []
    assert stream.calls == 1


@given(st.text(alphabet='<>tol_ca{}":,nme[]/ \n', max_size=80))
def test_no_text_is_lost_where_there_is_no_call(text: str) -> None:
    said, calls = read(TAGGED, list(text))
    assert calls == []
    assert "".join(said.split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        (None, TOLD),
        ("{{ messages }}", TOLD),
        ("{% if tools %}<tool_call>{% endif %}", TAGGED),
        ("{% if tools %}<|python_tag|>{% endif %}", LLAMA),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}<tool_call><function=x>{% endif %}", TOLD),
    ],
)
def test_a_template_tells_its_syntax(template: str | None, syntax: Syntax) -> None:
    assert syntax_of(template) is syntax


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def toolset(**more: Any) -> Toolset:
    return read_tools(Fields({"tools": [TOOL], **more}))


def test_a_model_that_knows_no_tools_is_told_in_words() -> None:
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "x", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_call_id": "x", "content": "2"},
    ]
    messages, variables = prompt_of(history, toolset(), TOLD)
    assert variables == {}
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert '"name": "add"' in messages[0]["content"]
    assert messages[2]["content"] == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    )
    assert messages[3]["content"] == "<tool_response>\n2\n</tool_response>"
    assert all("tool_calls" not in message for message in messages)
    _, variables = prompt_of(history, toolset(), TAGGED)
    assert variables["tools"] == [TOOL]
    mistral, _ = prompt_of(history, toolset(), MISTRAL)
    assert len(mistral[2]["tool_call_id"]) == 9


def test_choices() -> None:
    assert toolset().calls is Calls.AUTO
    assert toolset(tool_choice="none").tools == ()
    assert toolset(tool_choice="required").calls is Calls.REQUIRED
    named = toolset(tool_choice={"type": "function", "function": {"name": "add"}})
    assert (named.names, named.parallel) == (frozenset({"add"}), False)
    for wrong in ("any", {"type": "function", "function": {"name": "sub"}}, {"type": "custom"}, 5):
        with pytest.raises(ApiError, match="tool_choice"):
            toolset(tool_choice=wrong)


def test_a_tool_that_cannot_be_enforced() -> None:
    schema = {"type": "object", "patternProperties": {"x": {}}}
    function: dict[str, Any] = {"name": "add", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    hinted = read_tools(Fields({"tools": tools, "tool_choice": "required"}))
    assert "object" in answer_grammar(hinted, TAGGED, "text", None, thinking=False)
    function["strict"] = True
    strict = read_tools(Fields({"tools": tools, "tool_choice": "required"}))
    with pytest.raises(ApiError, match="patternProperties"):
        answer_grammar(strict, TAGGED, "text", None, thinking=False)
    assert answer_grammar(toolset(), TAGGED, "text", None, thinking=False) == ""


# --- thoughts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "thought", "said"),
    [
        ("Hello <think>", False, "", "Hello <think>"),
        ("<think>\nHm, so.\n</think>\n\nYes.", False, "Hm, so.", "Yes."),
        ("Hm.</think>Yes.", True, "Hm.", "Yes."),
        (" \n<think></think>Yes", False, "", "Yes"),
        ("<think>never ends  ", False, "never ends", ""),
        ("<thin", False, "", "<thin"),
        ("  spaced", False, "", "  spaced"),
        ("a </thi b</think> c </think>", True, "a </thi b", "c </think>"),
    ],
)
@settings(max_examples=25)
@given(at=st.lists(st.integers(0, 60), max_size=12))
def test_thoughts_are_told_from_words(
    text: str, opened: bool, thought: str, said: str, at: list[int]
) -> None:
    splitter = ReasoningSplitter(opened=opened)
    parts = [splitter.feed(piece) for piece in cut(text, at)] + [splitter.finish()]
    assert "".join(part[0] for part in parts) == thought
    assert "".join(part[1] for part in parts) == said
