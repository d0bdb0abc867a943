"""Placeholder"""

from __future__ import annotations

from fastapi import APIRouter

from sfumato.server.context import Context


def routes(context: Context) -> APIRouter:
    """No routes yet."""
    return APIRouter()
