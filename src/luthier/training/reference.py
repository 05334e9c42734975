"""The reference of DPO: the base's log-probabilities of every pair a run will meet, computed before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from luthier.data.prepared import Prepared
from luthier.engines.verbs import Floats, Trainee
from luthier.runs.manifest import find_manifest, seal
from luthier.training.batches import Item, read_item
from luthier.training.passes import Pass

FILE = "reference.safetensors"


class ReferenceTable:
    """Reference log-probabilities by example."""

    def __init__(self, examples: Iterable[int], offsets: np.ndarray, logprobs: np.ndarray) -> None:
        self.places = {int(example): number for number, example in enumerate(examples)}
        self.offsets, self.logprobs = offsets, logprobs

    def __call__(self, item: Item) -> Floats:
        """Those of an item's trained tokens."""
        place = self.places[item.example]
        found: Floats = self.logprobs[self.offsets[place] : self.offsets[place + 1]]
        return found


def compute_references(
    engine: Trainee, prepared: Prepared, examples: Iterable[int], way: Pass
) -> ReferenceTable | None:
    """One pass with the weights as they stand, which must be those of the base; None when asked to stop on the way."""
    chosen = sorted({int(example) for example in examples})
    counts = [read_item(prepared, example).trained_tokens for example in chosen]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    logprobs = np.zeros(int(offsets[-1]))
    table = ReferenceTable(chosen, offsets, logprobs)
    for passed in way.over(engine, prepared, chosen):
        start = 0
        for item in passed.items:
            stop = start + item.trained_tokens
            table(item)[:] = passed.computed.logprobs[start:stop]
            start = stop
    total = engine.sum_over_processes(np.concatenate([[float(bool(way.stop))], logprobs]))
    return None if total[0] else ReferenceTable(chosen, offsets, total[1:])


def write_references(folder: Path, table: ReferenceTable, facts: Mapping[str, object]) -> None:
    """Keep the table, sealed, for a run that is resumed; `facts` say what it was computed from."""
    tensors = {
        "examples": np.array(list(table.places), np.int64),
        "offsets": table.offsets,
        "logprobs": table.logprobs,
    }
    seal(folder, lambda draft: save_file(tensors, draft / FILE), dict(facts))


def find_references(folder: Path, facts: Mapping[str, object]) -> ReferenceTable | None:
    """The table that was kept for these facts, if it is whole."""
    manifest = find_manifest(folder)
    if manifest is None or any(manifest.facts.get(key) != value for key, value in facts.items()):
        return None
    found = load_file(folder / FILE)
    return ReferenceTable(found["examples"].tolist(), found["offsets"], found["logprobs"])
