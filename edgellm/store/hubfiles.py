"""Which files of a repository are the model that was asked for. Pure: paths in, paths out.

The same choice is made of what a hub lists and of what lies in the cache. GGUF goes before ONNX;
of several quantisations the one asked for is taken, else Q4_K_M, else another of 4 bits, else the
first. Projectors, importance matrices and adapters are no models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from edgellm.errors import UsageError
from edgellm.store.hubname import HubName

DEFAULT_QUANT = "Q4_K_M"
TOKENIZER = "tokenizer.json"
ONNX_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What lies beside a graph and says how its text is made."""
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.I | re.S)
_QUANT = re.compile(
    r"(?<![A-Z0-9])((UD-)?I?Q[1-8](_[A-Z0-9]+)*|TQ[12]_0|MXFP4(_MOE)?|NVFP4|BF16|F16|FP16|F32)"
    r"(?![A-Z0-9])",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(
    r"(?<![a-z0-9])(mmproj|imatrix|lora|adapter|projector|control[-_]vector)(?![a-z0-9])", re.I
)
_GRAPH = re.compile(
    r"(model|decoder_model_merged|decoder_with_past_model)(?P<label>_[A-Za-z0-9_-]+)?", re.I
)
_NO_GRAPH = re.compile(
    r"(encoder|vision|audio|embed|embedding|embeddings|speech|tokenizer|detokenizer|lm_head"
    r"|decoder_model)(?![a-z])",
    re.I,
)
_FOUR_BITS = re.compile(r"q4|int4|4bit", re.I)
_EIGHT_BITS = re.compile(r"quantized|q8|int8|8bit", re.I)
_OTHER_PROCESSORS = re.compile(
    r"(?<![a-z0-9])(cuda|gpu|dml|directml|webgpu|qnn|npu|openvino|vitis|vitisai|rocm|migraphx"
    r"|trtrtx|tensorrt|nvtensorrtrtx|coreml)(?![a-z])",
    re.I,
)
_MANY = 12


@dataclass(frozen=True, slots=True)
class Choice:
    """A model of a repository."""

    quant: str
    """As the files are named; empty where they are not named by one."""
    files: tuple[str, ...]
    """Paths in the repository; the first is the one that is opened."""
    onnx: bool = False
    """Then there may be more: the graph names files of weights."""


def choose(paths: Iterable[str], name: HubName) -> Choice:
    """The model that ``name`` means among ``paths``. Raises UsageError, with what there is."""
    there = sorted(set(paths))
    found = models(there, name.path)
    if name.quant:
        wanted = [choice for choice in found if _is_called(choice, name.quant)]
        if not wanted:
            raise UsageError(
                f"hf.co/{name.repo} has no {name.quant}. It has: {_list(found)}.",
                hint=f"Name one of them: hf.co/{name.repo}:QUANTISATION.",
            )
        found = wanted
    if found:
        return min(enumerate(found), key=lambda each: (*_rank(each[1]), each[0]))[1]
    if name.path and not any(f"{path}/".startswith(f"{name.path}/") for path in there):
        raise UsageError(f"hf.co/{name.repo} has no file {name.path}.")
    raise UsageError(
        f"{name} is no model that edgellm can run: there is no GGUF file and no ONNX graph of a"
        " decoder.",
        hint="Look for a repository with GGUF in its name.",
    )


def models(paths: Collection[str], below: str = "") -> list[Choice]:
    """All models among ``paths``, GGUF where there is any: those that are the file ``below``, or
    lie in the folder ``below``, where it is not empty. In the order of the paths."""
    gguf, onnx = ggufs(paths), graphs(paths)
    if below:
        split = _PART.fullmatch(below)
        first = f"{split['stem']}-00001-of-{split['count']}.gguf" if split else below
        exact = [choice for choice in (*gguf, *onnx) if choice.files[0] == first]
        if exact or below.lower().endswith((".gguf", ".onnx")):
            return exact or _named(paths, below)
        gguf = [choice for choice in gguf if choice.files[0].startswith(f"{below}/")]
        onnx = [choice for choice in onnx if choice.files[0].startswith(f"{below}/")]
    return gguf or onnx


def _named(paths: Collection[str], path: str) -> list[Choice]:
    """A file that its name does not show to be a model, but that was asked for by it."""
    if path not in paths or _PART.fullmatch(path):
        return []
    if path.lower().endswith(".onnx"):
        return [_graph(path, paths)]
    return [Choice(_quant(path), (path,))]


def ggufs(paths: Collection[str]) -> list[Choice]:
    """Whole files, and split ones of which all parts are there."""
    there = set(paths)
    found = []
    for path in sorted(there):
        if not path.lower().endswith(".gguf") or _NO_MODEL.search(PurePosixPath(path).name):
            continue
        part = _PART.fullmatch(path)
        if part is None:
            found.append(Choice(_quant(path), (path,)))
        elif int(part["number"]) == 1:
            parts = [
                f"{part['stem']}-{number:05d}-of-{part['count']}.gguf"
                for number in range(1, int(part["count"]) + 1)
            ]
            if there.issuperset(parts):
                found.append(Choice(_quant(part["stem"]), tuple(parts)))
    return found


def _quant(path: str) -> str:
    """The quantisation that a file's name tells, or its folder's; empty if neither does."""
    pure = PurePosixPath(path)
    stem = pure.name.removesuffix(".gguf")
    for text in (stem, *reversed(pure.parts[:-1])):
        told = [match[1] for match in _QUANT.finditer(text)]
        if told:
            return told[-1].upper()
    return ""


def graphs(paths: Collection[str]) -> list[Choice]:
    """ONNX decoders, with what lies beside them."""
    all_graphs = [path for path in sorted(paths) if path.lower().endswith(".onnx")]
    known = [path for path in all_graphs if _GRAPH.fullmatch(PurePosixPath(path).stem)]
    if not known:
        known = [path for path in all_graphs if not _NO_GRAPH.match(PurePosixPath(path).stem)]
    return [_graph(path, paths) for path in known]


def _graph(path: str, paths: Collection[str]) -> Choice:
    """A graph with what lies beside it. Its tokenizer may lie one folder up."""
    pure = PurePosixPath(path)
    folders = [pure.parent]
    if pure.parent.name == "onnx":
        folders.append(pure.parent.parent)
    beside = [str(folder / name) for folder in folders for name in ONNX_FILES]
    there = set(paths)
    match = _GRAPH.fullmatch(pure.stem)
    label = (match["label"] or "").strip("_-") if match else pure.stem
    if not label and pure.parent.name not in ("", "onnx"):
        label = pure.parent.name
    return Choice(label, (path, *[each for each in beside if each in there]), onnx=True)


def data_guess(graph: str, paths: Iterable[str]) -> list[str]:
    """Files that by their names are weights of ``graph``. Only the graph itself says it for sure:
    this is to tell how much is to come."""
    return [path for path in paths if path.startswith((f"{graph}_data", f"{graph}."))]


def _is_called(choice: Choice, quant: str) -> bool:
    """Whether a quantisation that somebody typed means this one."""
    if choice.quant.casefold() == quant.casefold():
        return True
    whole = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    return whole.search(choice.files[0]) is not None


def _rank(choice: Choice) -> tuple[int, int, int]:
    """The lower, the rather it is taken when nobody says which."""
    quant, path = choice.quant, choice.files[0]
    if not choice.onnx:
        default = quant == DEFAULT_QUANT
        return (0, 0 if default else 1 if quant.removeprefix("UD-").startswith("Q4") else 2, 0)
    elsewhere = int(_OTHER_PROCESSORS.search(path) is not None)
    bits = 0 if _FOUR_BITS.search(path) else 1 if _EIGHT_BITS.search(path) else 2
    return (elsewhere, bits, len(quant))


def _list(found: list[Choice]) -> str:
    named = list(dict.fromkeys(choice.quant or choice.files[0] for choice in found))
    more = f" and {len(named) - _MANY} more" if len(named) > _MANY else ""
    return (", ".join(named[:_MANY]) or "no model") + more
