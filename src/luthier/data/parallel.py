"""Read blocks by as many processes as there are cores, and give the results back in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from luthier.data.rows import ReadOptions, RowBatch, RowReader
from luthier.data.source import Block
from luthier.errors import DataError

# Below this a second process costs more to start than it saves.
PARALLEL_BYTES = 24 << 20

_reader: RowReader | None = None


def _start_reader(options: ReadOptions, names: tuple[str, ...]) -> None:
    global _reader
    _reader = RowReader(options, names)


def _read_in_worker(block: Block) -> RowBatch:
    assert _reader is not None
    return _reader.read(block)


@contextmanager
def read_blocks(
    options: ReadOptions, names: tuple[str, ...], blocks: Iterator[Block], total_bytes: int
) -> Iterator[Iterator[RowBatch]]:
    """Batches in the order of their blocks; by several processes where there is enough to read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or total_bytes < PARALLEL_BYTES:
        reader = RowReader(options, names)
        yield (reader.read(block) for block in blocks)
        return
    # Spawned, not forked: the parent may hold threads of a progress bar or of a tokenizer.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(cores, context, initializer=_start_reader, initargs=(options, names))
    try:
        yield _in_order(pool, blocks, 2 * cores)
    except BrokenProcessPool:
        raise DataError(
            "a process that read rows was killed, most likely for memory",
            hint="free some memory and run again; nothing was cached",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, blocks: Iterator[Block], ahead: int) -> Iterator[RowBatch]:
    waiting: deque[Future[RowBatch]] = deque()
    for block in blocks:
        waiting.append(pool.submit(_read_in_worker, block))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
