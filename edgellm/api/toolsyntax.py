"""Which syntax a model's tool calls have, how it is told of tools, and the grammar of a call. Pure.

A family is told by its chat template. A model whose template knows nothing of tools is told of them
in words, in the syntax that most others were taught.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgellm.api.errors import ApiError
from edgellm.api.gbnf import Grammar, choice, literal
from edgellm.api.schema import SchemaGrammar
from edgellm.api.tools import Calls, Tool, Toolset
from edgellm.api.toolstream import Syntax

TAGGED = Syntax("tagged", ("<tool_call>",), ("</tool_call>",))
"""Hermes, Qwen, and many that learnt from them: an object within tags."""
LLAMA = Syntax("llama", ("<|python_tag|>",), ("<|eom_id|>",), bare=True, arguments="parameters")
"""Llama 3.1 and later: an object and nothing else."""
MISTRAL = Syntax("mistral", ("[TOOL_CALLS]",), named=True)
"""A list of objects after a control token; later ones a name and its arguments."""
TOLD = Syntax("told", ("<tool_call>",), ("</tool_call>",))
"""As ``TAGGED``, by an instruction of ours."""
SYNTAXES = (TAGGED, LLAMA, MISTRAL, TOLD)
MARKS = tuple(
    dict.fromkeys(
        [mark for each in SYNTAXES for mark in (*each.opens, *each.closes)]
        + ["[ARGS]", "<think>", "</think>"]
    )
)
"""What may be a control token, of which text services show nothing."""

_INSTRUCTION = """\
You may call functions to help with the user's request. These are their signatures, one a line:
<tools>
{tools}
</tools>
To call one, answer with nothing but a JSON object with its name and arguments, within tags:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def syntax_of(template: str | None) -> Syntax:
    """The syntax that a model with this chat template writes calls in."""
    if template is None or "tools" not in template:
        return TOLD
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return TAGGED
    if "<|python_tag|>" in template or '"parameters"' in template:
        return LLAMA
    return TOLD


def prompt_of(
    messages: Sequence[dict[str, Any]], toolset: Toolset, syntax: Syntax
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and variables for the model's template."""
    if syntax is TOLD:
        written = [_in_words(message) for message in messages]
        if toolset.calls is Calls.NONE:
            return written, {}
        tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in toolset.offered)
        return _instructed(written, _INSTRUCTION.format(tools=tools)), {}
    made = [_with_ids(message) for message in messages] if syntax is MISTRAL else list(messages)
    return made, {} if toolset.calls is Calls.NONE else {"tools": list(toolset.offered)}


def _instructed(messages: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """With an instruction in the system message, which is made where there is none."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{words}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def _in_words(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without tool calls of its own: they are in its text."""
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls", ())
    if not calls:
        return dict(message)
    written = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in calls
    ]
    content = "\n".join(filter(None, (message["content"], *written)))
    return {"role": "assistant", "content": content}


def _with_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of calls as Mistral's templates insist on: nine letters and digits."""
    made = dict(message)
    if "tool_call_id" in made:
        made["tool_call_id"] = _short(made["tool_call_id"])
    if "tool_calls" in made:
        made["tool_calls"] = [{**call, "id": _short(call["id"])} for call in made["tool_calls"]]
    return made


def _short(text: str) -> str:
    kept = "".join(each for each in text if each.isascii() and each.isalnum())
    return kept[-9:].rjust(9, "0")


# --- grammar --------------------------------------------------------------------------


def answer_grammar(
    toolset: Toolset, syntax: Syntax, form: str, schema: object, *, thinking: bool
) -> str:
    """The grammar of an answer; empty where anything may be written.

    ``form`` is the kind of ``response_format``; ``thinking``: the answer begins within a thought,
    in which anything may be written. Raises ApiError 400 for what cannot be carried out.
    """
    grammar = Grammar()
    parts = []
    if form == "json_schema":
        name = "response_format.json_schema.schema"
        parts.append(SchemaGrammar(grammar, schema, name).root())
    elif form == "json_object":
        parts.append(grammar.built_in("object"))
    if toolset.calls is Calls.REQUIRED:
        parts = []  # a call must come, whatever form other answers have
    elif not parts:
        return ""
    if toolset.calls is not Calls.NONE:
        parts.append(_calls(grammar, toolset, syntax))
    root = choice(parts)
    if thinking:
        thought = grammar.rule(r'[^<]* ("<" [^/] [^<]*)* "</think>"')
        root = f"{thought} [ \\n]{{0,4}} {root}"
    return grammar.text(root)


def _calls(grammar: Grammar, toolset: Toolset, syntax: Syntax) -> str:
    call = grammar.rule(" | ".join(_call(grammar, tool, syntax) for tool in toolset.tools))
    if syntax is MISTRAL:
        more = f'("," " "? {call})*' if toolset.parallel else ""
        return grammar.rule(f'"[TOOL_CALLS]" " "? "[" {call} {more} "]"')
    if syntax is LLAMA:
        more = f'(";" " "? {call})*' if toolset.parallel else ""
        return grammar.rule(f"{call} {more}".strip())
    one = grammar.rule(f'"<tool_call>" "\\n"? {call} "\\n"? "</tool_call>"')
    return grammar.rule(f'{one} ("\\n"? {one})*') if toolset.parallel else one


def _call(grammar: Grammar, tool: Tool, syntax: Syntax) -> str:
    where = f"tools.{tool.name}.parameters"
    try:
        arguments = SchemaGrammar(grammar, tool.parameters, where).root()
    except ApiError:
        if tool.told["function"].get("strict"):
            raise
        arguments = grammar.built_in("object")  # what is not strict is a hint
    name = literal(json.dumps(tool.name, ensure_ascii=False))
    key = literal(json.dumps(syntax.arguments))
    return f'"{{\\"name\\": " {name} ", " {key} ": " {arguments} "}}"'
