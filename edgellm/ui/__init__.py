"""The page that ``edgellm serve`` shows at ``/``: static files, nothing from outside.

It talks to the API as any client does; nothing here knows how it is served.
"""

from __future__ import annotations

from importlib.resources import files

PAGE = "index.html"
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "app.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "cluster.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "http.js": "text/javascript; charset=utf-8",
    "told.js": "text/javascript; charset=utf-8",
}
"""Media type of each file of the page. A name that is not here is no file of it."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy for all of them: scripts, styles and requests of this server only."""


def page_file(name: str) -> bytes:
    """The content of one file of the page. Raises KeyError for a name that is none."""
    if name not in KINDS:
        raise KeyError(name)
    return (files("edgellm.ui") / "static" / name).read_bytes()
