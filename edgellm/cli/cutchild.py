"""The process that computes for ``cutchecks``: one part of a model, then it ends.

Run as ``python -m edgellm.cli.cutchild``. A part is computed by the engine of a real stage; a whole
GGUF model straight by llama.cpp, which shares nothing with that engine but the bindings. What makes
either crash ends this process and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgellm.bench.plain import PlainModel
from edgellm.engine.base import Float32, SlotRow, StageEngine
from edgellm.engine.childmessages import Answer, answer_calls
from edgellm.engine.childside import open_channel
from edgellm.engine.server import stage_config_from
from edgellm.engine.stage_main import ENGINES
from edgellm.errors import StageError
from edgellm.wire.plain import settings_from_plain

SLOT = 0


def whole(request: Mapping[str, Any]) -> Answer:
    """The GGUF model at ``path`` straight on llama.cpp: ``calls``, then ``steps`` tokens more, each
    the likeliest. Answers as ``run`` does."""
    settings = settings_from_plain(request["settings"])
    model = PlainModel(str(request["path"]), (), ())
    model.open(settings.context, settings.threads, settings.chunk)
    return _answered(request, model.logits)


def run(request: Mapping[str, Any]) -> Answer:
    """Load ``config``, decode ``calls`` in order, and ``steps`` more tokens, each the likeliest.

    The first part of a model takes the token ids of ``calls``, a later one the ``rows`` that the
    part before gave for each. Answers ``calls`` with what was decoded, and ``out``: float32 bytes
    of each call, rows [tokens, width] or the last token's logits [vocabulary]. ``control`` is what
    a later part makes of the first call's rows with all but the last one in another order.
    """
    config = stage_config_from(request["config"])
    engine = ENGINES[config.engine][0](config)
    try:
        told = request.get("rows")
        if told is None:
            return _answered(request, lambda call, at: _decode(engine, call, None, at))
        rows = [np.frombuffer(each, np.float32).reshape(-1, engine.width) for each in told]
        left = iter(rows)
        answer = _answered(request, lambda call, at: _decode(engine, call, next(left), at))
        engine.clear(SLOT)
        backwards = np.concatenate([rows[0][:-1][::-1], rows[0][-1:]])
        control = _decode(engine, request["calls"][0], backwards, 0)
        return {**answer, "control": control.tobytes()}
    finally:
        engine.close()


def _answered(
    request: Mapping[str, Any], decode: Callable[[Sequence[int], int], Float32]
) -> dict[str, Any]:
    """``decode`` takes token ids and the position of the first."""
    calls = [list(call) for call in request["calls"]]
    out: list[Float32] = []
    position = 0
    for number in range(len(calls) + int(request["steps"])):
        if number >= len(calls):
            calls.append([int(out[-1].argmax())])
        out.append(decode(calls[number], position))
        position += len(calls[number])
    return {"calls": calls, "out": [each.tobytes() for each in out]}


def _decode(
    engine: StageEngine, call: Sequence[int], rows: Float32 | None, position: int
) -> Float32:
    """One call; the answer is our own copy."""
    tokens = np.array(call, np.int32) if rows is None else None
    decoded = engine.decode([SlotRow(SLOT, position, len(call), True)], tokens, rows)
    made = decoded.logits if decoded.hidden is None else decoded.hidden
    if made is None:
        raise StageError("the engine gave neither hidden rows nor logits.")
    return np.array(made, np.float32)


def main() -> None:
    answer_calls(open_channel(), {"run": run, "whole": whole})


if __name__ == "__main__":
    main()
