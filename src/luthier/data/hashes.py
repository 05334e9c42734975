"""64-bit hashes of what rows say, and the arithmetic that turns a seed and a hash into an order."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import numpy.typing as npt
import orjson

from luthier.data.example import Conversation, Example, Text, user_text

Hashes = npt.NDArray[np.uint64]


def hash_bytes(data: bytes) -> int:
    """The first 64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def content_hash(example: Example) -> int:
    """Equal for rows that would train the same, whatever format or key order they came in."""
    if isinstance(example, Conversation):
        said: object = [example.messages, example.tools]
    elif isinstance(example, Text):
        said = example.text
    else:
        said = [example.prompt, example.chosen, example.rejected, example.tools]
    return hash_bytes(orjson.dumps(said, option=orjson.OPT_SORT_KEYS))


class _Dropped(dict[int, int | None]):
    """str.translate table that drops white space and punctuation, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        drop = character.isspace() or unicodedata.category(character).startswith("P")
        self[code] = None if drop else code
        return self[code]


_DROPPED = _Dropped()
_ASCII_DROPPED = bytes(code for code in range(128) if _DROPPED[code] is None)


def prompt_hash(example: Example) -> int:
    """Equal for prompts that differ only in case, width, white space and punctuation."""
    text = user_text(example)
    if text.isascii():
        return hash_bytes(text.encode().lower().translate(None, _ASCII_DROPPED))
    return hash_bytes(unicodedata.normalize("NFKC", text).casefold().translate(_DROPPED).encode())


def mix(values: Hashes, seed: int) -> Hashes:
    """Spread 64-bit values by a seed (splitmix64): a fixed function, so that orders never change with a library."""
    with np.errstate(over="ignore"):
        z = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
