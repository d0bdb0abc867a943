"""JSON schemas for the OpenAPI page, derived from the fields of ``Request``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from sfumato.pipeline.request import Request


def request_properties() -> dict[str, Any]:
    """The JSON schema of every field of a request."""
    hints = get_type_hints(Request)
    return {
        f.name: {**TypeAdapter(hints[f.name]).json_schema(), "description": f.metadata.get("help", "")}
        for f in fields(Request)
    }


def job_body() -> tuple[str, dict[str, Any]]:
    """The body of ``POST /jobs``."""
    model = {"type": "string", "description": "a name from /models; the default model if left out"}
    properties = {**request_properties(), "model": model}
    return "application/json", {
        "type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False,
    }  # fmt: skip


def body_of(*kinds: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """What OpenAPI says of a body: its schema by media type."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in kinds}}}
