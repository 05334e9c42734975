"""A server of ours as a person runs it: `luthier serve` in a process, with a key, a worker and the practice model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.runs.resolve import practice_folder

ROOT = Path(__file__).parents[1]
MODEL = "Qwen/Qwen3-0.6B"
OTHER_MODEL = "Qwen/Qwen3-4B"
_PATIENCE_SECONDS = 120
_ENTRY = "from luthier.cli.main import entry; entry()"


@dataclass(frozen=True)
class Serving:
    """A server that runs."""

    url: str
    key: str
    home: Path
    process: subprocess.Popen[str]


@contextmanager
def serve(place: Path, *more: str) -> Iterator[Serving]:
    """A server whose models are the practice model under names that clients know; it ends with the block."""
    home, log = place / "server", place / "server.log"
    command = [
        *(sys.executable, "-P", "-c", _ENTRY, "serve", "--json", "--port", "0", "--home", str(home)),
        *("--models", str(name_models(place / "models")), "--offer", "H100=cpu", *more),
    ]
    with log.open("w") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=clean_environment(place), cwd=place
        )
    assert process.stdout
    try:
        told = _read_object(process)
        assert told, f"the server did not start:\n{log.read_text()}"
        yield Serving(told["address"], told["key"], home, process)
    finally:
        process.terminate()
        process.wait(_PATIENCE_SECONDS)
        process.stdout.close()


def _read_object(process: subprocess.Popen[str]) -> dict[str, str]:
    """The first JSON object that a process prints; empty where it ends without."""
    assert process.stdout
    lines: list[str] = []
    while (line := process.stdout.readline()) and line != "}\n":
        lines.append(line)
    return dict(json.loads("".join([*lines, line]))) if line else {}


def name_models(folder: Path) -> Path:
    """The practice model under names that clients know."""
    for name in (MODEL, OTHER_MODEL):
        shutil.copytree(practice_folder(), folder / name)
    return folder


def clean_environment(home: Path) -> dict[str, str]:
    """What a server needs of this process's environment, with the source of this checkout first, and no network."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    own = {name: str(home / "home") for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    return {**kept, **own, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_rows(folder: Path, count: int = 16) -> Path:
    """The folder with conversations to train on and to hold out, and pairs, in OpenAI's formats, from the demo."""
    folder.mkdir(exist_ok=True)
    demo = ROOT / "examples" / "demo"
    conversations = [row for row in _read(demo / "heldout.jsonl") if "messages" in row]
    _write(folder / "rows.jsonl", conversations[:count])
    _write(folder / "held.jsonl", conversations[count : count + 4])
    _write(folder / "pairs.jsonl", [_pair(row) for row in _read(demo / "preference.jsonl")[:count]])
    return folder


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def _pair(row: dict[str, str]) -> dict[str, object]:
    return {
        "input": {"messages": [{"role": "user", "content": row["prompt"]}]},
        "preferred_output": [{"role": "assistant", "content": row["chosen"]}],
        "non_preferred_output": [{"role": "assistant", "content": row["rejected"]}],
    }
