"""A model's tokenizer as GGUF holds it: tokens, types, scores or merges, and the name of its pre-tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from luthier.data.tokens import ModelText
from luthier.errors import ModelError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s|"
_TEKKEN = _CASES % ("*", "+") + _CASES % ("+", "*") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name by the pattern, and by whether a word that is a token whole skips the merges.
_SPLITS: dict[str, dict[bool, str]] = {
    _WORDS + r"\p{N}" + _REST: {False: "qwen2"},
    _WORDS + r"\p{N}{1,3}" + _REST: {True: "llama-bpe", False: "smaug-bpe"},
    _TEKKEN: {True: "tekken"},
}
_ELSEWHERE = "`luthier export --to merged` writes a folder that other converters can read"


@dataclass(frozen=True)
class Vocabulary:
    """All that a GGUF file says of a tokenizer; `ids` are those of bos, eos, unknown and padding, where there are."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool | None
    text: ModelText
    notes: tuple[str, ...] = ()

    def find_id(self, token: str) -> int | None:
        """The id of a token by its text."""
        found: int | None = self.text.tokenizer.token_to_id(token)
        return found


def read_vocabulary(folder: Path, size: int, *, chat_template: Path | None = None) -> Vocabulary:
    """The tokenizer of a model folder for an embedding table of `size` rows; a chat template in place of its own."""
    text = ModelText(folder, chat_template=chat_template)
    facts: dict[str, Any] = orjson.loads((folder / "tokenizer.json").read_bytes())
    model = facts["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"GGUF: a tokenizer of the type {model.get('type')} cannot be written", hint=_ELSEWHERE)
    tokens, types = _list_tokens(facts, size)
    ids = _find_ids(folder, text)
    encoded = text.tokenizer.encode("a", add_special_tokens=True).ids
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "ids": ids,
        "adds_bos": "bos" in ids and encoded[:1] == [ids["bos"]],
        "adds_eos": "eos" in ids and encoded[-1:] == [ids["eos"]],
        "text": text,
    }
    if model.get("byte_fallback"):
        return _sentence_pieces(facts, common)
    pre, notes = _find_pre(facts)
    merges = [" ".join(_pair(each)) for each in model["merges"]]
    return Vocabulary(model="gpt2", pre=pre, scores=None, merges=merges, adds_space=None, notes=tuple(notes), **common)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _list_tokens(facts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row of the embeddings; rows without a token get a name that no text gives."""
    model, by_pieces = facts["model"], bool(facts["model"].get("byte_fallback"))
    named = {number: token for token, number in model["vocab"].items()}
    added = {each["id"]: each for each in facts.get("added_tokens", [])}
    last = max([*named, *added])
    if last >= size:
        raise ModelError(f"the tokenizer has a token {last}, and the embeddings have {size} rows")
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for number, token in named.items():
        tokens[number] = token
        types[number] = BYTE if by_pieces and _is_byte(token) else NORMAL
        if by_pieces and token == model.get("unk_token"):
            types[number] = UNKNOWN
    for number, each in added.items():
        if types[number] == UNKNOWN:
            continue
        tokens[number] = each["content"] if each.get("special") else each["content"].replace(_SPACE, " ")
        types[number] = CONTROL if each.get("special") else USER_DEFINED
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _find_ids(folder: Path, text: ModelText) -> dict[str, int]:
    """The ids of the tokens with a part to play: as the tokenizer names them, else as the config does."""
    named, config = (_read(folder / name) for name in ("tokenizer_config.json", "config.json"))
    found: dict[str, int] = {}
    for key in ("bos", "eos", "unk", "pad"):
        token = named.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number: Any = text.tokenizer.token_to_id(token) if token else None
        if number is None and f"{key}_token" not in named:
            given = config.get(f"{key}_token_id")
            number = given[0] if isinstance(given, list) and given else given
        if isinstance(number, int):
            found[key] = number
    return found


def _read(path: Path) -> dict[str, Any]:
    found = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


# -- byte-level ------------------------------------------------------------------------------------------------------


def _find_pre(facts: Mapping[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for the way text is cut before the merges."""
    notes = []
    normalizer = facts.get("normalizer")
    if normalizer is not None:
        if normalizer.get("type") != "NFC":
            raise _no_name(f"the normalizer {normalizer.get('type')}")
        notes.append("llama.cpp does not compose characters (NFC): text with separate accents gets other tokens there")
    before = facts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    levels = [each for each in steps if each.get("type") == "ByteLevel"]
    if len(levels) != 1 or steps[-1] is not levels[0] or levels[0].get("add_prefix_space"):
        raise _no_name("the way its pre-tokenizer is put together")
    ignores = bool(facts["model"].get("ignore_merges"))
    if levels[0].get("use_regex", True):
        kinds = [(each.get("type"), each.get("individual_digits")) for each in steps[:-1]]
        name = {(): "gpt-2", (("Digits", True),): "smollm"}.get(tuple(kinds))
        if name is None or ignores:
            raise _no_name("the way its pre-tokenizer is put together")
        return name, notes
    if len(steps) != 2 or steps[0].get("type") != "Split" or steps[0].get("behavior") != "Isolated":
        raise _no_name("the way its pre-tokenizer is put together")
    pattern = (steps[0].get("pattern") or {}).get("Regex", "")
    name = _SPLITS.get(pattern, {}).get(ignores)
    if name is None:
        told = " for tokens that skip the merges" if ignores and pattern in _SPLITS else ""
        raise _no_name(f"the pattern {pattern!r}{told}")
    return name, notes


def _no_name(what: str) -> UnsupportedError:
    return UnsupportedError(f"GGUF: llama.cpp has no name for {what} of this tokenizer", hint=_ELSEWHERE)


# -- pieces with a space mark ----------------------------------------------------------------------------------------


def _sentence_pieces(facts: Mapping[str, Any], common: dict[str, Any]) -> Vocabulary:
    """Scores in the order of the merges: the piece that is made first has the highest one."""
    model = facts["model"]
    ranks: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = _pair(merge)
        ranks.setdefault(left + right, len(ranks))
    _check_merges(facts, ranks)
    last = -float(len(ranks) + 1)
    scores = [
        -float(ranks[token]) if kind == NORMAL and token in ranks else last if kind == NORMAL else 0.0
        for token, kind in zip(common["tokens"], common["types"], strict=True)
    ]
    adds_space, notes = _find_space(facts, is_chat=bool(common["text"].template_source))
    return Vocabulary(
        model="llama", pre="default", scores=scores, merges=None, adds_space=adds_space, notes=notes, **common
    )


def _check_merges(facts: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """llama.cpp joins any two pieces that make a third, best score first; merges that say otherwise are refused."""
    model = facts["model"]
    added = {each["content"] for each in facts.get("added_tokens", [])}
    pieces = {token for token in model["vocab"] if not _is_byte(token)} - added
    listed = {_pair(each) for each in model["merges"]}
    order = [ranks[left + right] for left, right in map(_pair, model["merges"]) if left + right in pieces]
    if any(after < before for before, after in pairwise(order)):
        raise _unlike(model["merges"][0])
    for pair in _pairs_of(pieces):
        if pair not in listed:
            raise _unlike(pair)


def _pairs_of(pieces: set[str]) -> Iterator[tuple[str, str]]:
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                yield piece[:cut], piece[cut:]


def _unlike(pair: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"GGUF: the merges of this tokenizer are not those of SentencePiece (see {' + '.join(pair)!r}), "
        "and llama.cpp would cut text differently",
        hint=_ELSEWHERE,
    )


def _find_space(facts: Mapping[str, Any], *, is_chat: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether text gets a space put before it, at its start and after each control token, as llama.cpp does it."""
    normalizer, before = facts.get("normalizer") or {}, facts.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(each.get("type") not in (None, "Prepend", "Replace") for each in steps):
        raise _no_name("the normalizer")
    scheme = before.get("prepend_scheme", "always") if before.get("type") == "Metaspace" else None
    if scheme != "first":
        return scheme == "always" or any(each.get("type") == "Prepend" for each in steps), ()
    # This tokenizer puts a space before the whole text only, where a chat has a control token.
    if is_chat:
        return False, ("plain text without a control token before it begins without a space mark in llama.cpp",)
    return True, ("text after a control token begins with a space more in llama.cpp",)
