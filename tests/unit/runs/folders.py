"""Small checkpoints that the tests of the run folder share, and every way to damage one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from luthier.runs.checkpoints import CheckpointStore, SavedCheckpoint, Writer

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": bytes(range(256)) * 4}
STATE = {"optimizer.safetensors": bytes(range(255, -1, -1)) * 8, "state.json": b'{"position": 32}'}


def writer(files: dict[str, bytes], step: int) -> Writer:
    """Writes these files, each of them another for another step."""

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content + str(step).encode())

    return write


def save(store: CheckpointStore, step: int, **facts: object) -> SavedCheckpoint:
    """One checkpoint."""
    return store.save(step, writer(FILES, step), writer(STATE, step), {"position": step * 4, "best": None, **facts})


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(len(content) * place))] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "delete": lambda path: path.unlink(),
    "truncate to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zero bytes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flip the first byte": lambda path: _flip(path, 0),
    "flip a byte in the middle": lambda path: _flip(path, 0.5),
    "flip the last byte": lambda path: _flip(path, 1),
    "add a byte": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "become a folder": lambda path: (path.unlink(), path.mkdir()),
}
