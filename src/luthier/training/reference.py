"""The reference of DPO: the base's log-probabilities of every pair a run will meet, computed before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from luthier.data.pack import lay_out_step
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Engine, Floats
from luthier.runs.manifest import find_manifest, seal
from luthier.training.batches import Item, build_batch, read_item
from luthier.training.signals import StopFlag

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
    engine: Engine,
    prepared: Prepared,
    examples: Iterable[int],
    *,
    budget_tokens: int,
    share: tuple[int, int],
    stop: StopFlag,
    tick: Callable[[int, int], None],
) -> ReferenceTable | None:
    """One pass with the weights as they stand, which must be those of the base; None when asked to stop on the way.

    `tick` is told the pairs done and in all.
    """
    chosen = sorted({int(example) for example in examples})
    counts = [read_item(prepared, example).trained_tokens for example in chosen]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    logprobs = np.zeros(int(offsets[-1]))
    places = {example: number for number, example in enumerate(chosen)}
    rank, count = share
    done = 0
    for window in range(rank, -(-len(chosen) // 64), count):
        items = [read_item(prepared, example) for example in chosen[window * 64 : window * 64 + 64]]
        for group in lay_out_step([item.tokens for item in items], budget_tokens):
            if stop:
                break
            batch = build_batch([items[place] for place in group])
            found = engine.forward(batch).result().logprobs
            start = 0
            for item in (items[place] for place in group):
                first = int(offsets[places[item.example]])
                logprobs[first : first + item.trained_tokens] = found[start : start + item.trained_tokens]
                start += item.trained_tokens
            done += len(group)
            tick(min(len(chosen), done * count), len(chosen))
    total = engine.sum_over_processes(np.concatenate([[float(bool(stop))], logprobs]))
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
