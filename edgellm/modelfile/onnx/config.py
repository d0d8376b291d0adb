"""What lies beside an ONNX graph: its folder's JSON files, read with bounds.

This file may import ``errors``. These files say what a graph does not: how long a context the
model was trained for, which tokens end an answer, how a chat is put into words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm.errors import ModelFileError, UsageError

MAX_CONFIG_BYTES = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
DEFAULT_CONTEXT = 2048
TOKENIZER_FILE = "tokenizer.json"
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_SUFFIX = ".onnx"
_USUAL_NAMES = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's folder: the graph, and what its files say. Empty where they do not say it."""

    graph: Path
    folder: Path
    """Where the tokenizer is; the graph may be in ``onnx/`` below."""
    name: str
    context: int
    hidden: int
    """Width of the model, as its configuration says; 0 if it does not."""
    chat_template: str | None
    bos: int | None
    eos: tuple[int, ...]
    raw: Mapping[str, Any] = field(repr=False)
    """``config.json``."""


def find_graph(path: Path) -> Path:
    """The graph that a path means: the file itself, or the folder's. Raises ModelFileError where
    there is none, UsageError where there are several."""
    if not path.is_dir():
        return path
    told = _object(path / "genai_config.json")
    name = _at(told, "model", "decoder", "filename")
    if isinstance(name, str) and name == Path(name).name and (path / name).is_file():
        return path / name
    folders = [path, path / "onnx"]
    for folder in folders:
        for usual in _USUAL_NAMES:
            if (folder / usual).is_file():
                return folder / usual
    found = sorted(file for folder in folders for file in folder.glob(f"*{_SUFFIX}"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(file.relative_to(path)) for file in found[:8])
        raise UsageError(
            f"{path} holds several graphs: {names}.", hint="Name one of them with --model."
        )
    raise ModelFileError(
        f"{path} is a directory that holds no {_SUFFIX} file.",
        field="model",
        hint="Name a GGUF file or an ONNX folder.",
    )


def is_onnx(path: Path) -> bool:
    """Whether a path names an ONNX model: such a file, or a folder. Nothing is read."""
    return path.suffix.lower() == _SUFFIX or path.is_dir()


def read_folder(graph: Path) -> ModelFolder:
    """What the files beside a graph say. Raises ModelFileError for those that are no JSON."""
    folder = graph.parent
    if folder.name == "onnx" and not (folder / TOKENIZER_FILE).exists():
        folder = folder.parent
    config = _object(folder / "config.json")
    genai = _object(folder / "genai_config.json")
    generation = _object(folder / "generation_config.json")
    name = config.get("_name_or_path")
    name = name.strip("/").rpartition("/")[2] if isinstance(name, str) else ""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    contexts = [_at(genai, "model", "context_length"), *[inner.get(key) for key in _CONTEXT_KEYS]]
    hidden = [inner.get("hidden_size"), inner.get("n_embd")]
    hidden.append(_at(genai, "model", "decoder", "hidden_size"))
    ends = [
        _at(genai, "model", "eos_token_id"),
        generation.get("eos_token_id"),
        config.get("eos_token_id"),
    ]
    starts = [_at(genai, "model", "bos_token_id"), config.get("bos_token_id")]
    return ModelFolder(
        graph=graph,
        folder=folder,
        name=(name or folder.name or graph.stem)[:200],
        context=_first(contexts, 1 << 24) or DEFAULT_CONTEXT,
        hidden=_first(hidden, 1 << 20) or 0,
        chat_template=_chat_template(folder),
        bos=_first(starts, 1 << 28, least=0),
        eos=tuple(dict.fromkeys(token for told in ends for token in _tokens(told))),
        raw=config,
    )


def _first(told: list[Any], most: int, least: int = 1) -> int | None:
    for value in told:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
    return None


def _tokens(told: Any) -> list[int]:
    values = told if isinstance(told, list) else [told]
    return [v for v in values[:256] if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _at(told: Any, *keys: str) -> Any:
    for key in keys:
        told = told.get(key) if isinstance(told, dict) else None
    return told


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    raw = read_small(path, MAX_CONFIG_BYTES)
    if raw is None:
        return {}
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no JSON: {error}.", field=path.name) from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} holds no JSON object.", field=path.name)
    return found


def read_small(path: Path, limit: int) -> bytes | None:
    """A regular file of at most ``limit`` bytes; None where there is none."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ModelFileError(f"{path} is no plain file.", field=path.name)
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(raw) > limit:
        raise ModelFileError(f"{path} is larger than {limit >> 20} MiB.", field=path.name)
    return raw


def _chat_template(folder: Path) -> str | None:
    """From ``chat_template.jinja``, or the tokenizer's configuration: one text, or several named
    ones, of which ``default`` is taken."""
    raw = read_small(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if raw is not None:
        return raw.decode("utf-8", "replace")
    told = _object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(told, list):
        named = {
            entry.get("name"): entry.get("template") for entry in told if isinstance(entry, dict)
        }
        told = named.get("default")
    return told if isinstance(told, str) else None
