"""Tokens, pieces, chat templates and stop strings: helper processes on real vocabularies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.engine.chat import ChatRenderer
from edgellm.engine.child import Child
from edgellm.engine.childcall import ChildCaller
from edgellm.engine.childmessages import MAX_MESSAGE_BYTES, MessageReader, pack_message
from edgellm.engine.text import TextService
from edgellm.engine.textstream import IncrementalDecoder, StopMatcher
from edgellm.errors import DeadlineError, ModelFileError, StageError, UsageError

MODELS = Path(
    os.environ.get("EDGELLM_TEST_MODELS", Path(__file__).parents[2].parent / "shared" / "models")
)
needs_llama = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
needs_jinja = pytest.mark.skipif(find_spec("jinja2") is None, reason="Jinja is not installed")
USER = {"role": "user", "content": "hi"}


def model(name: str) -> Path:
    path = MODELS / name
    if not path.exists():
        pytest.skip(f"the test model {name} is missing (set EDGELLM_TEST_MODELS)")
    return path


# --- streamed text (pure) -------------------------------------------------------------


def cut_up(whole: str | bytes, cuts: list[int]) -> list[str] | list[bytes]:
    edges = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[a:b] for a, b in pairwise(edges)]  # type: ignore[return-value]


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first prefix of ``text`` that ends with a stop string."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 1000), max_size=10),
)
def test_stop_strings_as_a_naive_search_finds_them(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    expected, stop = naive_stop(text, stops)
    shown = ""
    fed = ""
    for piece in cut_up(text, cuts):
        assert isinstance(piece, str)
        fed += piece
        shown += matcher.feed(piece)
        if matcher.matched is None:
            held = fed[len(shown) :]
            # Held back is the beginning of a stop string, and nothing else.
            assert not held or any(s.startswith(held) and s != held for s in stops)
            assert fed.startswith(shown)
    shown += matcher.finish()
    assert (shown, matcher.matched) == (expected, stop)
    if stop is not None:
        assert matcher.feed("more") == ""


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=30) | st.text(max_size=12).map(str.encode), st.lists(st.integers(0, 99)))
def test_decoding_in_pieces_is_decoding_at_once(data: bytes, cuts: list[int]) -> None:
    decoder = IncrementalDecoder()
    text = ""
    for piece in cut_up(data, cuts):
        assert isinstance(piece, bytes)
        text += decoder.feed(piece)
    assert text + decoder.finish() == data.decode("utf-8", "replace")


def test_an_unfinished_character_waits() -> None:
    decoder = IncrementalDecoder()
    assert [decoder.feed(bytes([byte])) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert decoder.finish() == ""
    assert decoder.feed("é".encode()[:1]) == ""
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize("stops", [[""], ["x" * 1001], [str(i) for i in range(17)]])
def test_bad_stop_strings(stops: list[str]) -> None:
    with pytest.raises(UsageError, match="stop string"):
        StopMatcher(stops)


# --- messages (pure) ------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.integers(0, 9) | st.binary(max_size=20))),
    st.lists(st.integers(0, 10000), max_size=8),
)
def test_messages_survive_any_cut(messages: list[dict[str, object]], cuts: list[int]) -> None:
    reader = MessageReader()
    stream = b"".join(pack_message(message) for message in messages)
    received = []
    for piece in cut_up(stream, cuts):
        assert isinstance(piece, bytes)
        received += reader.feed(piece)
    assert received == messages


@pytest.mark.parametrize(
    "data",
    [
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"),
        b"\x01\0\0\0\xc1",
        b"\x01\0\0\0\x05",
        b"\x02\0\0\0\x05\x05",
        b"\x03\0\0\0\x81\x01\x01",
    ],
)
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(StageError, match="a helper process sent"):
        MessageReader().feed(data)


def test_requests_that_cannot_be_sent() -> None:
    with pytest.raises(UsageError, match="cannot be encoded"):
        pack_message({"x": object()})
    with pytest.raises(UsageError, match="at most"):
        pack_message({"x": bytes(MAX_MESSAGE_BYTES)})


# --- calls ----------------------------------------------------------------------------

SLOW = """
import sys, time
from edgellm.engine.childmessages import answer_calls
from edgellm.engine.childside import open_channel
from edgellm.errors import ModelFileError

def sleep(request):
    time.sleep(request["seconds"])
    return {"slept": request["seconds"]}

def refuse(request):
    raise ModelFileError("bad", field="f", hint="do")

answer_calls(open_channel(), {"sleep": sleep, "refuse": refuse})
"""


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[ChildCaller]:
    (tmp_path / "slow_helper.py").write_text(SLOW)
    child = await Child.start(
        "slow_helper", name="the helper", environment={"PYTHONPATH": str(tmp_path)}
    )
    caller = ChildCaller(child)
    try:
        yield caller
    finally:
        await caller.stop()


async def test_a_call_that_was_cancelled_does_not_confuse_the_next(slow: ChildCaller) -> None:
    assert await slow.call("sleep", 20, seconds=0) == {"slept": 0, "call": 1}
    first = asyncio.create_task(slow.call("sleep", 5, seconds=0.2))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await slow.call("sleep", 5, seconds=0.01))["slept"] == 0.01
    results = await asyncio.gather(*(slow.call("sleep", 5, seconds=n / 1000) for n in range(9)))
    assert [result["slept"] for result in results] == [n / 1000 for n in range(9)]


async def test_a_typed_error_crosses_and_the_child_goes_on(slow: ChildCaller) -> None:
    with pytest.raises(ModelFileError) as caught:
        await slow.call("refuse", 20)
    assert caught.value.to_dict() == {
        "code": "model_invalid",
        "message": "bad",
        "field": "f",
        "hint": "do",
    }
    assert slow.alive


async def test_a_missed_deadline_kills(slow: ChildCaller) -> None:
    await slow.call("sleep", 20, seconds=0)
    with pytest.raises(DeadlineError, match=r"the helper did not answer within 0\.1 s"):
        await slow.call("sleep", 0.1, seconds=60)
    assert not slow.alive
    with pytest.raises(StageError, match="the helper was stopped"):
        await slow.call("sleep", 1, seconds=0)


# --- a vocabulary ---------------------------------------------------------------------


@pytest.fixture
async def text() -> AsyncIterator[TextService]:
    async with await TextService.start(model("stories260K-f32.gguf")) as service:
        yield service


@needs_llama
@pytest.mark.models
async def test_text_to_tokens_and_back(text: TextService) -> None:
    info = await text.info()
    assert (info.n_vocab, info.bos, info.eos, info.add_bos) == (512, 1, 2, True)
    assert 2 in info.eog
    assert (info.bos_text, info.eos_text) == ("<s>", "</s>")
    ids = await text.tokenize("Once upon a time, é🙂", True, False)
    assert ids[:5] == [1, 403, 407, 261, 378]
    pieces = await text.pieces(ids)
    assert pieces[0] == b""  # a control token is no text
    assert b"".join(pieces).decode() == " Once upon a time, é🙂"
    assert any(len(piece) == 1 and piece[0] >= 0x80 for piece in pieces)  # part of a character
    assert await text.tokenize("", False, False) == []
    assert await text.pieces([]) == []
    with pytest.raises(UsageError, match="token 512 is outside the vocabulary of 512"):
        await text.pieces([3, 512])
    with pytest.raises(UsageError, match="not Unicode text"):
        await text.tokenize("\ud800", True, False)


@needs_llama
@pytest.mark.models
async def test_special_tokens_only_where_asked(text: TextService) -> None:
    spelled = await text.tokenize("</s>", False, False)
    assert 2 not in spelled
    assert 2 in await text.tokenize("</s>", False, True)
    assert b"".join(await text.pieces(spelled)).strip() == b"</s>"


@needs_llama
@pytest.mark.models
async def test_all_pieces_of_a_large_vocabulary() -> None:
    async with await TextService.start(model("ggml-vocab-llama-spm.gguf")) as service:
        info = await service.info()
        everything = range(info.n_vocab)
        begin = time.perf_counter()
        pieces = await service.pieces(everything)
        assert len(pieces) == info.n_vocab == 32000
        assert time.perf_counter() - begin < 20
        os.kill(service.pid, signal.SIGKILL)
        assert await service.pieces(everything) == pieces  # from the cache: nobody is asked


@needs_llama
@pytest.mark.models
async def test_concurrent_requests_each_get_their_own_answer(text: TextService) -> None:
    words = [f"word {n} " * (n + 1) for n in range(20)]
    alone = [await text.tokenize(word, True, False) for word in words]
    together = await asyncio.gather(*(text.tokenize(word, True, False) for word in words))
    assert together == alone


@needs_llama
@pytest.mark.models
async def test_a_long_text(text: TextService) -> None:
    ids = await text.tokenize("Once upon a time. " * 20000, True, False)
    assert b"".join(await text.pieces(ids)).decode() == " " + "Once upon a time. " * 20000
    with pytest.raises(UsageError, match="at most"):
        await text.tokenize("x" * ((8 << 20) + 1), True, False)


@needs_llama
@pytest.mark.models
async def test_a_crash_of_the_tokenizer_is_a_stage_error(text: TextService) -> None:
    os.kill(text.pid, signal.SIGABRT)
    with pytest.raises(StageError, match=r"the tokenizer was aborted \(SIGABRT\)"):
        await text.tokenize("x", True, False)


@needs_llama
async def test_a_file_that_llama_refuses(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFileError, match=r"llama\.cpp refuses the vocabulary: ") as caught:
        await TextService.start(bad)
    assert caught.value.exit_code == 5


@needs_llama
def test_only_the_bindings_are_imported() -> None:
    """A child pays for what it calls: no Jinja, no numpy, none of the package's own layers."""
    import subprocess

    code = (
        "import sys, json\n"
        "from edgellm.engine.childside import import_llama_bindings\n"
        "bindings = import_llama_bindings()\n"
        "assert bindings is import_llama_bindings()\n"
        "assert bindings.llama_max_devices() > 0\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[2], check=True
    )
    modules = set(json.loads(done.stdout))
    assert "llama_cpp.llama_cpp" in modules
    assert not modules & {"jinja2", "numpy", "llama_cpp.llama", "asyncio"}


def test_a_missing_engine_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.engine import childside

    for name in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match="not installed") as caught:
        childside.import_llama_bindings()
    assert caught.value.hint is not None
    assert "pip install 'edgellm[llama]'" in caught.value.hint


def test_a_structure_refuses_fields_it_does_not_have() -> None:
    import ctypes

    from edgellm.engine.childside import set_fields

    class Parameters(ctypes.Structure):
        _fields_ = (("n_ctx", ctypes.c_uint32),)

    parameters = Parameters()
    set_fields(parameters, n_ctx=7)
    assert parameters.n_ctx == 7
    with pytest.raises(StageError, match="no field 'use_mmap' in Parameters"):
        set_fields(parameters, use_mmap=False)


# --- chat templates -------------------------------------------------------------------


@pytest.fixture
async def renderer() -> AsyncIterator[ChatRenderer]:
    renderer = ChatRenderer()
    try:
        yield renderer
    finally:
        await renderer.stop()


@needs_jinja
async def test_a_template_as_models_have_them(renderer: ChatRenderer) -> None:
    template = (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {%- if message.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}<|assistant|>{% endif %}\n"
    )
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    messages = [USER, {"role": "tool", "content": "-"}, {"role": "assistant", "content": "é🙂"}]
    assert (
        await renderer.render(template, messages, variables)
        == "<s><|user|>hi</s><|assistant|>é🙂</s><|assistant|>"
    )


@needs_jinja
async def test_what_templates_count_on(renderer: ChatRenderer) -> None:
    template = (
        "{% generation %}{{ {'b': '<é>', 'a': [1, none]} | tojson }}{% endgeneration %}"
        "{{ strftime_now('%Y') | length }}{{ missing is defined }}"
    )
    assert await renderer.render(template, [USER], {}) == '{"b": "<é>", "a": [1, null]}4False'


@needs_jinja
async def test_a_template_may_refuse_the_messages(renderer: ChatRenderer) -> None:
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        await renderer.render("{{ raise_exception('roles must alternate') }}", [USER], {})
    assert await renderer.render("{{ 1 + 1 }}", [USER], {}) == "2"


@needs_jinja
@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% if %}", "fails: TemplateSyntaxError"),
        ("{{ missing.attribute }}", "fails: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "fails: TypeError|fails: TemplateNotFound"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "ran longer than 1 s",
        ),
        ("{{ 'a' * 2000000 }}", "more than 1048576 characters"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "more than 1048576 characters"),
        pytest.param(
            "{{ ('a' * 1000000000) | length }}",
            "more than 256 MiB",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS"),
        ),
        ("x" * (1 << 20) + "y", "at most 1048576"),
    ],
)
async def test_a_template_at_fault(renderer: ChatRenderer, template: str, says: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ModelFileError, match=says) as caught:
        await renderer.render(template, [USER], {})
    assert time.perf_counter() - begin < 30
    assert "template" in caught.value.message
    assert caught.value.field == "tokenizer.chat_template"
    assert await renderer.render("ok {{ messages[0].content }}", [USER], {}) == "ok hi"


@needs_jinja
async def test_nothing_is_left_when_the_renderer_stops(renderer: ChatRenderer) -> None:
    await renderer.render("x", [USER], {})
    caller = renderer._caller
    assert caller is not None
    await renderer.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(caller.pid, 0)


@needs_jinja
@needs_llama
@pytest.mark.models
async def test_chat_through_the_service(text: TextService) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ add_generation_prompt }}"
    assert await text.render_chat(template, [USER]) == "<s>hi</s>True"
    assert await text.render_chat(template, [USER], False, {"eos_token": "!"}) == "<s>hi!False"
    with pytest.raises(UsageError, match="with a 'role'"):
        await text.render_chat(template, [{"content": "hi"}])
    with pytest.raises(UsageError, match="no JSON"):
        await text.render_chat(template, [{"role": "user", "content": b"hi"}])
    with pytest.raises(UsageError, match="as a template variable"):
        await text.render_chat(template, [USER], variables={"messages": []})
