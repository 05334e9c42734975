"""Perplexity of held-out plain texts: how many tokens a model is, on average, in doubt between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luthier.engines.verbs import Sampler
from luthier.evals.heldout import HeldOut

# Longer texts are read in pieces of so many tokens, as they would be trained.
_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Perplexity:
    """How well a model foretells some texts; the first token of a text has nothing that foretells it."""

    texts: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss of a token."""
        return math.exp(min(self.loss, 700.0))

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"texts": self.texts, "tokens": self.tokens, "loss": self.loss, "perplexity": self.perplexity}


def measure_perplexity(sampler: Sampler, held_out: HeldOut) -> Perplexity:
    """The mean loss over every token of the texts but the first of each."""
    pieces = [ids[at : at + _MAX_LENGTH] for ids in held_out.texts for at in range(0, len(ids), _MAX_LENGTH)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    tokens = sum(len(piece) - 1 for piece in pieces)
    total = sum(sampler.score(pieces))
    return Perplexity(len(held_out.texts), tokens, -total / tokens if tokens else math.nan)
