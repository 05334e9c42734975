"""Pages of lists and JSON answers, as OpenAI's SDK expects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Response
from pydantic import BaseModel, Field

from luthier.server.json_text import render_json


class PageAsked(BaseModel):
    """Where a list starts, and how long its page is."""

    after: Annotated[str, Field(max_length=200)] | None = None
    """The id of the last item of the page before."""
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    """Items on the page."""


def answer(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(render_json(value), status, media_type="application/json")


def render_page(found: Sequence[Any], has_more: bool, render: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page of a list."""
    shown = [render(item) for item in found]
    ends = {"first_id": shown[0].get("id"), "last_id": shown[-1].get("id")} if shown else {}
    return {"object": "list", "data": shown, "has_more": has_more, **ends}
