"""Show what would be trained, token by token: for a terminal, a page and a program."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from itertools import pairwise

from luthier.data.example import Text
from luthier.data.notes import NOTES, SPLIT, TRUNCATED
from luthier.data.reasons import RowError
from luthier.data.render import Sequence
from luthier.data.rows import RowReader
from luthier.data.source import Row
from luthier.data.tokens import ModelText
from luthier.spec.data import Data


@dataclass(frozen=True)
class ShownText:
    """One rendered text with its tokens; `pieces` are the characters behind each token."""

    line: int
    name: str
    text: str
    tokens: list[int]
    pieces: list[str]
    trained: list[int]
    control: list[bool]
    notes: list[str]

    @property
    def trained_text(self) -> str:
        """The characters of the trained tokens."""
        return "".join(piece for piece, on in zip(self.pieces, self.trained, strict=True) if on)

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "line": self.line,
            "name": self.name,
            "text": self.text,
            "tokens": self.tokens,
            "pieces": self.pieces,
            "trained": self.trained,
            "trained_text": self.trained_text,
            "notes": self.notes,
        }


def show_row(reader: RowReader, text: ModelText, line: int, row: Row) -> list[ShownText]:
    """The texts of one row as they would be trained: one for a conversation, two for a pair.

    Raises RowError or MaskError for a row that would not be.
    """
    parts = reader.sequences(row)
    named = [(name, s) for part in parts for name, s in zip(_names(part), part, strict=True)]
    encoded, ranges = reader.encode([sequence for _, sequence in named])
    shown = []
    for index, (name, sequence) in enumerate(named):
        ids = encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist()
        trained = [0] * len(ids)
        for first, last in ranges[index].tolist():
            trained[first:last] = [1] * (last - first)
        pieces = _pieces(text, sequence.text)
        control = [piece in text.control_tokens for piece in pieces]
        notes = sorted(sequence.notes)
        shown.append(ShownText(line, name, sequence.text, ids, pieces, trained, control, notes))
    is_text = isinstance(reader.example(row), Text)
    return [fitted for each in shown for fitted in _fitted(each, reader.data, is_text=is_text)]


def _fitted(shown: ShownText, data: Data, *, is_text: bool) -> list[ShownText]:
    """Cut, parted or refused, as preparation would."""
    length, limit = len(shown.tokens), data.max_length
    if length <= limit:
        return [shown]
    if data.too_long == "split" and is_text:
        pieces = -(-length // limit)
        edges = pairwise(length * number // pieces for number in range(pieces + 1))
        return [_stretch(shown, slice(*edge), SPLIT) for edge in edges]
    if data.too_long != "truncate" or not any(shown.trained[:limit]):
        raise RowError("too_long", f"{length:,} tokens; data.max_length is {limit:,}")
    return [_stretch(shown, slice(limit), TRUNCATED)]


def _stretch(shown: ShownText, part: slice, note: str) -> ShownText:
    """Some of the tokens."""
    cut = {name: getattr(shown, name)[part] for name in ("tokens", "pieces", "trained", "control")}
    return replace(shown, **cut, text="".join(cut["pieces"]), notes=[*shown.notes, note])


def _names(part: list[Sequence]) -> list[str]:
    return ["chosen", "rejected"] if len(part) == 2 else [""]


def _pieces(text: ModelText, rendered: str) -> list[str]:
    """The characters of each token; of a character in several tokens, the first has it.

    A piece reaches from where the one before ended, since some tokenizers leave spaces out of their offsets.
    """
    pieces = []
    at = 0
    for _, end in text.tokenizer.encode(rendered, add_special_tokens=False).offsets:
        pieces.append(rendered[at : max(at, end)])
        at = max(at, end)
    return pieces


def visible(piece: str) -> str:
    """White space that matters, made visible; line breaks stay breaks."""
    return piece.replace("\n", "\u21b5\n").replace("\t", "\u2192")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --back: #1a7f3722; --line: #1a7f37; --control: #8250df; --quiet: #57606a; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --back: #3fb95033; --line: #3fb950; --control: #d2a8ff; --quiet: #8b949e; }}
}}
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace;
  border: 1px solid #8884; border-radius: 6px; padding: 1rem;
}}
.t {{ background: var(--back); border-bottom: 2px solid var(--line); }}
.c {{ color: var(--control); font-weight: 600; }}
.k {{ color: var(--quiet); }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; }}
</style></head><body>
<h1>{title}</h1>
<p class="k"><span class="t">Underlined</span> tokens are trained;
<span class="c">control tokens</span> are one token each. Point at a token for its id.</p>
{body}
</body></html>
"""


def render_page(title: str, shown: list[ShownText]) -> str:
    """A self-contained page; whatever a row says is text in it."""
    body = "\n".join(_section(each) for each in shown)
    return _PAGE.format(title=html.escape(title), body=body)


def _section(shown: ShownText) -> str:
    count = sum(shown.trained)
    name = f", {shown.name}" if shown.name else ""
    head = f"<h2>line {shown.line}{name}: {count} of {len(shown.tokens)} tokens trained</h2>"
    spans = []
    for number, piece, on, control in zip(shown.tokens, shown.pieces, shown.trained, shown.control, strict=True):
        classes = " ".join(name for name, holds in (("t", on), ("c", control)) if holds)
        spans.append(f'<span class="{classes}" title="{number}">{html.escape(visible(piece))}</span>')
    notes = "".join(f'<p class="k">note: {html.escape(NOTES[name])}</p>' for name in shown.notes)
    return f"{head}\n{notes}<pre>{''.join(spans)}</pre>"
