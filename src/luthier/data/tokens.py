"""The model's own tokenizer, read from its folder without transformers, and the mask from characters to tokens.

Texts are encoded in batches. `gigatoken` (extra `fast`) is used where it is installed and a sample of the user's own
rows comes out identical to the model's tokenizer; the first difference ends that for the run (`FastTokenizerDiffers`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from tokenizers import Tokenizer

from luthier.data.spans import Span
from luthier.data.template import ChatTemplate
from luthier.errors import MissingPathError, ModelError, TemplateError

Ids = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]
_COMPARED_FIRST = 32
_COMPARED_EVERY = 256


class FastTokenizerDiffers(Exception):
    """The fast tokenizer gave other ids than the model's own for a row of the user's data."""


@dataclass(slots=True)
class Encoded:
    """Token ids of many texts end to end: text i is ids[offsets[i]:offsets[i + 1]]."""

    ids: Ids
    offsets: Ints


class ModelText:
    """What a model folder says about text: tokenizer, control tokens, chat template."""

    def __init__(self, folder: Path, *, chat_template: Path | None = None) -> None:
        self.folder = folder
        raw = _read_bytes(folder / "tokenizer.json", folder)
        self._facts: dict[str, Any] = _parse(raw, folder / "tokenizer.json")
        self._config: dict[str, Any] = _read_json(folder / "tokenizer_config.json")
        try:
            self.tokenizer = Tokenizer.from_buffer(raw)
        except Exception as error:  # tokenizers raises bare Exception for every malformed file
            raise ModelError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.bos_token = self._named_token("bos_token")
        self.eos_token = self._named_token("eos_token") or self._configured_eos()
        added = self._facts.get("added_tokens", [])
        declared = self._config.get("added_tokens_decoder", {}).values()
        special = {t["content"] for t in (*added, *declared) if t.get("special")}
        self.control_tokens = sorted(special | ({self.eos_token} - {""}))
        self.added_tokens = sorted({token["content"] for token in added})
        self._given_template = chat_template
        self.template_source = self._find_template(chat_template)
        named = [self._named_token(key) for key in ("bos_token", "pad_token", "unk_token")]
        self.hash = hashlib.sha256(raw + orjson.dumps([*named, self.eos_token, self.control_tokens])).hexdigest()

    @property
    def template_hash(self) -> str:
        """SHA-256 of the chat template's source; empty without one."""
        return hashlib.sha256(self.template_source.encode()).hexdigest() if self.template_source else ""

    def build_template(self) -> ChatTemplate | None:
        """The chat template, compiled; None for a model without one."""
        if not self.template_source:
            return None
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        tokens |= {key: name for key in ("pad_token", "unk_token") if (name := self._named_token(key))}
        name = str(self._given_template) if self._given_template else f"chat template of {self.folder.name}"
        return ChatTemplate(self.template_source, tokens=tokens, name=name)

    @property
    def text_prefix(self) -> str:
        """The token plain text starts with in this model's training; empty for most."""
        begins = self.tokenizer.encode("a", add_special_tokens=True).tokens[:1]
        return self.bos_token if self.bos_token and begins == [self.bos_token] else ""

    def end_tokens(self, named: Iterable[str]) -> tuple[int, ...]:
        """Ids of what ends an answer: these tokens, the end of text, and what the folder's generation settings say."""
        settings = _read_json(self.folder / "generation_config.json").get("eos_token_id")
        told = set(settings if isinstance(settings, list) else [settings])
        ids = {self.tokenizer.token_to_id(token) for token in (*named, self.eos_token) if token}
        return tuple(sorted(number for number in ids | told if isinstance(number, int)))

    def _named_token(self, key: str) -> str:
        token = self._config.get(key)
        return str(token.get("content", "")) if isinstance(token, dict) else token or ""

    def _configured_eos(self) -> str:
        eos = _read_json(self.folder / "config.json").get("eos_token_id")
        first = eos[0] if isinstance(eos, list) and eos else eos
        return (self.tokenizer.id_to_token(first) or "") if isinstance(first, int) else ""

    def _find_template(self, given: Path | None) -> str:
        path = given or self.folder / "chat_template.jinja"
        if given is not None and not given.is_file():
            raise MissingPathError(f"no chat template at {given}", hint="`model.chat_template` names a Jinja file")
        if path.is_file():
            try:
                return path.read_text("utf-8")
            except UnicodeDecodeError:
                raise TemplateError(f"{path}: not UTF-8 text") from None
        template = self._config.get("chat_template") or ""
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template", "") for entry in template if isinstance(entry, dict)}
            template = named.get("default", "")
        return str(template)

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.uint8] | None:
        """Bytes of text behind each token id, where the tokenizer is byte-level and so loses none; else None."""
        if not _is_byte_level(self._facts):
            return None
        vocabulary = self._facts["model"]["vocab"]
        size = max([*vocabulary.values(), *(t["id"] for t in self._facts.get("added_tokens", []))]) + 1
        lengths = np.zeros(size, np.int64)
        for token, number in vocabulary.items():
            lengths[number] = len(token)
        for token in self._facts.get("added_tokens", []):
            lengths[token["id"]] = len(token["content"].encode())
        return lengths.astype(np.uint8) if lengths.max() < 256 else None


def _is_byte_level(facts: dict[str, Any]) -> bool:
    normalizer, before = facts.get("normalizer"), facts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    adds_space = any(step.get("add_prefix_space") for step in steps)
    strips = any(t.get("lstrip") or t.get("rstrip") or t.get("single_word") for t in facts.get("added_tokens", []))
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    plain = normalizer is None or normalizer.get("type") == "NFC"
    return plain and bool(levels) and not adds_space and not strips and facts["model"].get("type") == "BPE"


class Encoder:
    """Encodes texts and maps character spans to token ranges."""

    def __init__(self, text: ModelText, *, fast: bool = True) -> None:
        self._text = text
        self._bytes = text.token_bytes
        self._count = 0
        self._fast: Any = None
        if (
            fast
            and self._bytes is not None
            and importlib.util.find_spec("gigatoken")
            and importlib.util.find_spec("awkward")
        ):
            self._fast = _load_fast(text.folder / "tokenizer.json")

    @property
    def name(self) -> str:
        """Which library encodes."""
        return "gigatoken" if self._fast is not None else "tokenizers"

    def encode(self, texts: list[str], spans: list[list[Span]]) -> tuple[Encoded, list[npt.NDArray[np.uint32]]]:
        """Ids of the texts, and for each text its trained token ranges (n x 2) from its character spans."""
        if not texts:
            return Encoded(np.zeros(0, np.uint32), np.zeros(1, np.int64)), []
        if self._bytes is None:
            return self._encode_with_offsets(texts, spans)
        encoded = self._encode_fast(texts) if self._fast is not None else self._encode_own(texts)
        return encoded, self._ranges(texts, spans, encoded)

    def _encode_own(self, texts: list[str]) -> Encoded:
        return _joined([e.ids for e in self._text.tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

    def _encode_fast(self, texts: list[str]) -> Encoded:
        layout = self._fast.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        ids = np.asarray(layout.content.data, np.uint32)[offsets[0] : offsets[-1]]
        encoded = Encoded(ids, offsets - offsets[0])
        for index in range(len(texts)):
            if self._count < _COMPARED_FIRST or self._count % _COMPARED_EVERY == 0:
                own = self._text.tokenizer.encode(texts[index], add_special_tokens=False).ids
                if own != encoded.ids[encoded.offsets[index] : encoded.offsets[index + 1]].tolist():
                    raise FastTokenizerDiffers
            self._count += 1
        return encoded

    def _ranges(self, texts: list[str], spans: list[list[Span]], encoded: Encoded) -> list[npt.NDArray[np.uint32]]:
        """Spans to token ranges by adding up the bytes behind each token, for the whole batch at once."""
        assert self._bytes is not None
        ends = np.cumsum(self._bytes[encoded.ids], dtype=np.int64)
        bounds = np.concatenate([[0], ends])[encoded.offsets]
        in_bytes = [_byte_spans(text, own) for text, own in zip(texts, spans, strict=True)]
        sizes = np.array([size for size, _ in in_bytes], np.int64)
        exact = np.diff(bounds) == sizes
        counts = [len(own) for _, own in in_bytes]
        flat = np.array([place for _, own in in_bytes for span in own for place in span], np.int64).reshape(-1, 2)
        texts_of = np.repeat(np.arange(len(texts)), counts)
        starts = ends - self._bytes[encoded.ids]
        shifted = flat + bounds[:-1][texts_of][:, None]
        first = np.searchsorted(ends, shifted[:, 0], side="right")
        last = np.searchsorted(starts, shifted[:, 1], side="left")
        ranges = np.stack([first, last], 1) - encoded.offsets[:-1][texts_of][:, None]
        found = np.split(ranges.astype(np.uint32), np.cumsum(counts)[:-1])
        for index in np.flatnonzero(~exact):
            # Normalisation changed the text (NFC), so bytes do not add up: ask the tokenizer itself.
            own = self._text.tokenizer.encode(texts[index], add_special_tokens=False)
            found[index] = _ranges_by_offsets(own.offsets, spans[index])
        return found

    def _encode_with_offsets(
        self, texts: list[str], spans: list[list[Span]]
    ) -> tuple[Encoded, list[npt.NDArray[np.uint32]]]:
        done = self._text.tokenizer.encode_batch(texts, add_special_tokens=False)
        ranges = [_ranges_by_offsets(each.offsets, own) for each, own in zip(done, spans, strict=True)]
        return _joined([each.ids for each in done]), ranges


def _load_fast(path: Path) -> Any:
    import gigatoken

    try:
        return gigatoken.Tokenizer.from_json(path.read_bytes())
    except Exception:  # a tokenizer it does not know: the model's own does the work
        return None


def _joined(ids: list[list[int]]) -> Encoded:
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(each) for each in ids], out=offsets[1:])
    flat = np.fromiter((token for each in ids for token in each), np.uint32, int(offsets[-1]))
    return Encoded(flat, offsets)


def _byte_spans(text: str, spans: list[Span]) -> tuple[int, list[Span]]:
    """The text's size in bytes and its spans in bytes; -1 for a text that a normaliser may change."""
    if text.isascii():
        return len(text), spans
    if not unicodedata.is_normalized("NFC", text):
        return -1, spans
    found = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    return len(text.encode()), found


def _ranges_by_offsets(offsets: list[tuple[int, int]], spans: list[Span]) -> npt.NDArray[np.uint32]:
    """Tokens that overlap each span, by the tokenizer's own character offsets."""
    starts = np.array([a for a, _ in offsets], np.int64)
    ends = np.array([b for _, b in offsets], np.int64)
    found = []
    for start, end in spans:
        inside = np.flatnonzero((ends > start) & (starts < end))
        found.append((inside[0], inside[-1] + 1) if len(inside) else (0, 0))
    return np.array(found, np.uint32).reshape(-1, 2)


def _read_bytes(path: Path, folder: Path) -> bytes:
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json in this model folder",
            hint="save the tokenizer in the fast format: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    return path.read_bytes()


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(raw)
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected an object")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(path.read_bytes(), path) if path.is_file() else {}
