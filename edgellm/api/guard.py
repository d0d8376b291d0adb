"""The door of the server, before any route: rules, preflights of browsers, counting, last words.

Plain ASGI. What goes wrong behind it becomes an error object here; no traceback reaches a client.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgellm.api.security import Rules
from edgellm.api.sse import as_error, error_response

_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, OPTIONS",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}
_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Guard:
    """See the module. ``answered`` hears of each response: path of the scope, status."""

    def __init__(
        self, app: ASGIApp, rules: Rules, answered: Callable[[Scope, int], None] | None = None
    ) -> None:
        self._app = app
        self._rules = rules
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        origin, begun = headers.get("origin"), False

        async def sent(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                more = list(_ALWAYS)
                if origin is not None:
                    more.append((b"vary", b"origin"))
                    if origin in self._rules.origins:
                        more.append((b"access-control-allow-origin", origin.encode("latin-1")))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
                if self._answered is not None:
                    self._answered(scope, message["status"])
            await send(message)

        try:
            self._rules.check(scope["method"], scope["path"], scope["headers"])
            if scope["method"] == "OPTIONS" and origin is not None:
                await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, sent)
                return
            await self._app(scope, receive, sent)
        except ClientDisconnect:
            pass  # there is nobody to tell
        except Exception as error:  # noqa: BLE001 - whatever it is, its client gets an answer
            if not begun:
                await error_response(as_error(error))(scope, receive, sent)
