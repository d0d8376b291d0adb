"""Facts about JSON schemas for ``schema``: keywords, formats, what excludes what. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "example", "deprecated", "readOnly",
        "writeOnly", "$schema", "$id", "$comment", "$defs", "definitions", "discriminator",
        "contentMediaType", "contentEncoding", "strict",
    }
)  # fmt: skip
"""Keywords that say nothing of what is valid."""

TYPES: Mapping[str, frozenset[str]] = {
    "object": frozenset(
        {"properties", "required", "additionalProperties", "minProperties", "maxProperties"}
    ),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"pattern", "format", "minLength", "maxLength"}),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "integer": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}
    ),
    "boolean": frozenset(),
    "null": frozenset(),
}
"""What may be said of each type."""

KEYWORDS = frozenset({"type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref"}).union(
    *TYPES.values()
)

_DATE = '[1-9] [0-9]{3} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
"""No month lacks its days 1 to 28; the others would need a calendar."""
_CLOCK = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?'
_ZONE = '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
_BYTE = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9] | [0-9])'
_LABEL = "[a-z0-9] ([-a-z0-9]{0,30} [a-z0-9])?"
FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": f"{_CLOCK} {_ZONE}",
    "date-time": f'{_DATE} "T" {_CLOCK} {_ZONE}',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
    "ipv4": f'{_BYTE} "." {_BYTE} "." {_BYTE} "." {_BYTE}',
    "email": f'[a-zA-Z0-9_]+ ([-+.] [a-zA-Z0-9_]+)* "@" {_LABEL} ("." {_LABEL})+',
    "hostname": f'{_LABEL} ("." {_LABEL})*',
    "uri": f'("https" | "http") "://" {_LABEL} ("." {_LABEL})* ("/" [-a-zA-Z0-9._~/]*)?',
}
"""Texts of a format, as expressions without the quotes."""

_KINDS: Mapping[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}


def fits(value: object, types: Sequence[object]) -> bool:
    """Whether a JSON value is of one of the types."""
    return any(_is_of(value, each) for each in types)


def _is_of(value: object, kind: object) -> bool:
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return kind == "number" or float(value).is_integer()
    return isinstance(kind, str) and type(value) in _KINDS.get(kind, ())


def own_type(schema: object) -> object:
    """The type that a schema names, or shows by its keywords; None where it does not."""
    if not isinstance(schema, dict):
        return None
    if "type" in schema:
        return schema["type"]
    found = [name for name in ("object", "array", "string") if schema.keys() & TYPES[name]]
    return found[0] if len(found) == 1 else None


def exclusive(parts: Sequence[object]) -> bool:
    """Whether no value can be valid for two of the schemas, as far as can be seen easily."""
    return all(_apart(left, right) for at, left in enumerate(parts) for right in parts[:at])


def _apart(left: object, right: object) -> bool:
    """Different types, different fixed values, or a required property with such."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        return False
    fixed = _fixed(left), _fixed(right)
    if fixed[0] is not None and fixed[1] is not None:
        return not any(each in fixed[1] for each in fixed[0])
    kinds = own_type(left), own_type(right)
    if isinstance(kinds[0], str) and isinstance(kinds[1], str) and kinds[0] != kinds[1]:
        return set(kinds) != {"integer", "number"}
    if kinds != ("object", "object"):
        return False
    shared = set(_names(left)) & set(_names(right))
    mine, theirs = left.get("properties", {}), right.get("properties", {})
    return any(_apart(mine.get(name), theirs.get(name)) for name in shared)


def _names(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required", [])
    return [name for name in required if isinstance(name, str)]


def _fixed(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def merged(left: Mapping[str, Any], right: object) -> dict[str, Any] | None:
    """One schema for what two say together; None where that cannot be told easily."""
    if not isinstance(right, dict):
        return None
    whole = dict(left)
    for key, value in right.items():
        told = whole.get(key)
        if key in ANNOTATIONS or told is None or told == value:
            whole.setdefault(key, value)
        elif key == "required" and isinstance(told, list) and isinstance(value, list):
            whole[key] = [*told, *(name for name in value if name not in told)]
        elif key == "properties" and isinstance(told, dict) and isinstance(value, dict):
            if any(told[name] != value[name] for name in told.keys() & value.keys()):
                return None
            whole[key] = {**told, **value}
        else:
            return None
    return whole
