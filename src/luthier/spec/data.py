"""The `[data]` table: which rows are read, which tokens are trained, and what is held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.spec.part import Part

FormatName = Literal["auto", "chat", "alpaca", "sharegpt", "completion", "text", "preference"]
TooLong = Literal["drop", "truncate", "split", "error"]
TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
SpanSource = Literal["auto", "markers"]


class Data(Part):
    """Rows in, and exactly the tokens that will be trained out."""

    train: str | None = Field(None, min_length=1)
    """Rows to train on: a jsonl, json, csv or parquet file (or .gz, .zst), a folder, `hf:org/name[:config]:split`."""
    valid: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] | str = 0.05
    """Rows held out for evaluation: a share (0.05), a count (500) or a file of their own; 0 holds out nothing."""
    format: FormatName = "auto"
    """Format of the rows; `auto` tells it row by row."""
    group_by: str | None = None
    """Key of the source rows whose equal values stay on one side of the split, such as a user or a game id."""
    examples: int | None = Field(None, ge=1)
    """Use only the first N rows of the source, for a smoke run."""
    max_rejected_share: float = Field(0.05, ge=0, le=1)
    """Share of malformed rows above which the run stops instead of going on without them."""
    max_length: int = Field(2048, ge=8)
    """Longest rendered example in tokens, prompt and answer together."""
    too_long: TooLong = "drop"
    """A longer example: `drop` it, `truncate` its end, `split` it (plain text only), or stop with an `error`."""
    train_on: TrainOn = "assistant"
    """Trained: each `assistant` turn, the `last_assistant`, the `completion` of the last user turn, or `all` tokens."""
    spans: SpanSource = "auto"
    """Who says which tokens are an assistant turn: the full rendering (`auto`), or the template's `markers`."""
    unroll: bool = False
    """Make one example of each assistant turn, so that thinking dropped from history by the template is trained too."""
