"""The process that renders chat templates. Run as ``python -m edgellm.engine.chat_child``.

The environment is the one that templates on the Hugging Face hub are written for: trimmed
blocks, loop controls, ``raise_exception``, ``strftime_now``, ``tojson``, ``{% generation %}``.
Templates come from strangers: the sandbox keeps them from attributes and mutation, this
process's limits from everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from edgellm.engine.childmessages import Answer, answer_calls
from edgellm.engine.childside import limit_memory, open_channel
from edgellm.errors import ModelFileError, StageError, UsageError

MEMORY_BYTES = 256 << 20
"""What rendering may take beyond the interpreter and its modules."""
OUTPUT_CHARACTERS = 1 << 20
TEMPLATE_FIELD = "tokenizer.chat_template"
_RAW_HINT = "Use --raw to send the prompt without the template."


class RefusedMessagesError(Exception):
    """The template called ``raise_exception``: it does not take these messages."""


def _raise_exception(message: object = "") -> NoReturn:
    raise RefusedMessagesError(str(message)[:500])


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter: that one escapes HTML, which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_environment() -> Any:
    """The sandboxed environment. Raises StageError where Jinja is not installed."""
    try:
        from jinja2 import nodes  # noqa: PLC0415 - optional, and only this process needs it
        from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StageError(
            "Jinja is not installed, which chat templates need.",
            hint="Install it: pip install 'edgellm[llama]'.",
        ) from error

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - the name and shape that Jinja asks for

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render(environment: Any, request: Mapping[str, Any]) -> str:
    """Render ``template`` with ``context`` (a JSON object).

    Raises UsageError (it refuses the messages) or ModelFileError (the template is at fault).
    """
    try:
        template = environment.from_string(request["template"])
        parts: list[str] = []
        total = 0
        for part in template.generate(json.loads(request["context"])):
            total += len(part)
            if total > OUTPUT_CHARACTERS:
                raise _at_fault(f"makes more than {OUTPUT_CHARACTERS} characters of text")
            parts.append(part)
        return "".join(parts)
    except RefusedMessagesError as error:
        raise UsageError(
            f"the model's chat template refuses these messages: {_words(error)}."
        ) from error
    except MemoryError:
        raise _at_fault(f"needs more than {MEMORY_BYTES >> 20} MiB of memory") from None
    except ModelFileError:
        raise
    except Exception as error:  # a template may raise anything at all
        raise _at_fault(f"fails: {type(error).__name__}: {_words(error)}") from error


def _words(error: Exception) -> str:
    return str(error)[:500].rstrip(".")


def _at_fault(what: str) -> ModelFileError:
    return ModelFileError(
        f"the model's chat template {what}.", field=TEMPLATE_FIELD, hint=_RAW_HINT
    )


def main() -> None:
    channel = open_channel()
    environment: Any = None

    def ready(_request: Mapping[str, Any]) -> Answer:
        nonlocal environment
        environment = make_environment()
        environment.from_string("{{ messages }}").render(messages=[])  # imports what is lazy
        limit_memory(MEMORY_BYTES)
        return {}

    answer_calls(
        channel,
        {"ready": ready, "render": lambda request: {"text": render(environment, request)}},
    )


if __name__ == "__main__":
    main()
