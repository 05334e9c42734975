"""The `[model]` table: which base model the run starts from."""

from __future__ import annotations

from pydantic import Field

from luthier.spec.part import Part


class Model(Part):
    """The base model and the chat template its conversations are rendered with."""

    base: str = Field(min_length=1)
    """Hub id (`org/name`), folder, `practice` (the model shipped with Luthier), or `ft:<id>` of an earlier run."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the resolved commit is kept in the lineage."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the model's own; needed when the model has none."""
