"""The page of the API, ``/docs``: what ``/openapi.json`` says, as plain HTML that asks no one else for anything."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import FastAPI

METHODS = ("get", "post", "delete")
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; }
summary { cursor: pointer; padding: .35rem 0; }
code { font-size: .95em; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8886; }
"""


def page(app: FastAPI) -> str:
    """The page's HTML."""
    schema = app.openapi()
    groups: dict[str, list[str]] = {}
    for path, methods in schema["paths"].items():
        for method in METHODS:
            if method in methods:
                tag = next(iter(methods[method].get("tags", ())), "page")
                groups.setdefault(tag, []).append(_operation(method, path, methods[method]))
    title = f"{escape(schema['info']['title'])} {escape(schema['info']['version'])}: HTTP API"
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(found)}" for tag, found in groups.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="static/icon.svg" type="image/svg+xml">'
        f'<link rel="stylesheet" href="docs/style.css"></head><body><main><h1>{title}</h1>'
        '<p>The same as data: <a href="openapi.json">openapi.json</a>.</p>'
        f"{body}</main></body></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [(p["name"], p["schema"], p["in"]) for p in operation.get("parameters", ())]
    tables = [_table(rows)] if rows else []
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        required = schema.get("required", ())
        fields = [(n, s, "required" if n in required else "") for n, s in schema.get("properties", {}).items()]
        tables.append(f"<p>Body <code>{escape(kind)}</code></p>{_table(fields) if fields else ''}")
    head = f'<span class="method">{method.upper()}</span><code>{escape(path)}</code> {escape(operation["summary"])}'
    return f"<details><summary>{head}</summary>{''.join(tables)}</details>"


def _table(rows: list[tuple[str, dict[str, Any], str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(schema))}</td>"
        f"<td>{escape(' '.join(filter(None, (note, schema.get('description', '')))))}</td></tr>"
        for name, schema, note in rows
    )
    return f"<table><tr><th>name</th><th>type</th><th>meaning</th></tr>{cells}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    return str(schema.get("type", "any"))
