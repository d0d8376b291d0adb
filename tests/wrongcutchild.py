"""A ``cutchild`` that shifts the positions of later parts by one: a cut that is subtly wrong."""

from __future__ import annotations

from typing import Any

from edgellm.cli import cutchild
from edgellm.engine.childmessages import answer_calls
from edgellm.engine.childside import open_channel


def main() -> None:
    honest = cutchild._decode

    def shifted(engine: Any, call: Any, rows: Any, position: int) -> Any:
        return honest(engine, call, rows, position + (rows is not None))

    cutchild._decode = shifted

    answer_calls(open_channel(), {"run": cutchild.run, "whole": cutchild.whole})


if __name__ == "__main__":
    main()
