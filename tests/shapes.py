"""The chat templates of tests/templates, each with the facts that shapes.toml declares of it."""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import orjson
from tokenizers import AddedToken, Tokenizer

from luthier.data.spans import SpanFinder
from luthier.data.template import ChatTemplate
from luthier.runs.resolve import practice_folder

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Shape:
    """One family of templates."""

    name: str
    special_tokens: tuple[str, ...]
    plain_added_tokens: tuple[str, ...]
    bos_token: str
    eos_token: str
    system: bool
    tools: bool
    strict_alternation: bool
    rewrites_history: bool
    trims: bool
    end_of_turn: str
    final_end_of_turn: str
    header: str
    note: str

    @property
    def source(self) -> str:
        return (FOLDER / f"{self.name}.jinja").read_text("utf-8")

    def template(self) -> ChatTemplate:
        return ChatTemplate(
            self.source, tokens={"bos_token": self.bos_token, "eos_token": self.eos_token}, name=self.name
        )

    def finder(self, *, use_marks: bool = False) -> SpanFinder:
        control = [*self.special_tokens, self.eos_token]
        return SpanFinder(self.template(), control, list(self.plain_added_tokens), self.eos_token, use_marks=use_marks)

    def write_model(self, folder: Path) -> Path:
        """A model folder with this template: the practice tokenizer and the family's tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_file(str(practice_folder() / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in self.special_tokens])
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in self.plain_added_tokens])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"bos_token": self.bos_token or None, "eos_token": self.eos_token or None}
        (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config))
        shutil.copyfile(FOLDER / f"{self.name}.jinja", folder / "chat_template.jinja")
        return folder


@cache
def list_shapes() -> tuple[Shape, ...]:
    """Every family, in the order of the file."""
    tables = tomllib.loads((FOLDER / "shapes.toml").read_text("utf-8"))
    return tuple(
        Shape(name, tuple(facts.pop("special_tokens")), tuple(facts.pop("plain_added_tokens")), **facts)
        for name, facts in tables.items()
    )
