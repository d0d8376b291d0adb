"""The page at ``/``: the files of ``edgellm.ui``, which anybody who reaches the server may read.

They hold nothing of this cluster; what they show, they ask the API for, with the key.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgellm.ui import KINDS, PAGE, POLICY, page_file

PAGE_PATHS = frozenset({"/", *(f"/{name}" for name in KINDS)})


async def _page(request: Request) -> Response:
    name = request.url.path.lstrip("/") or PAGE
    return Response(
        page_file(name),
        headers={
            "content-type": KINDS[name],
            "content-security-policy": POLICY,
            "cache-control": "no-cache",  # a newer edgellm brings a newer page
        },
    )


def page_routes() -> list[Route]:
    """A route for each file, and for ``/``."""
    return [Route(path, _page, methods=["GET"]) for path in sorted(PAGE_PATHS)]
