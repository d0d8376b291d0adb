"""``/v1/embeddings``. No model that runs over stages gives any yet, and a client is told so."""

from __future__ import annotations

from edgellm.api.errors import ApiError
from edgellm.api.requests import EmbeddingRequest
from edgellm.api.served import Served


def refuse(request: EmbeddingRequest, served: Served) -> ApiError:
    """501: the request is good, and this model answers with tokens alone."""
    return ApiError(
        501,
        f"{served.name} gives no embeddings: it runs as a language model, whose last stage answers"
        f" with tokens ({len(request.inputs)} inputs were given).",
        param="model",
        code="embeddings_not_supported",
    )
