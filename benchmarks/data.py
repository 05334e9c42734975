"""Measure data preparation and packing beside TRL's, in one interleaved run: rows C6, C7 and C8 of the aims.

Run `make bench-data` (or `python benchmarks/data.py --rows 100000 --rounds 3`). It prints the table and checks first
that both sides give the same token ids and the same trained tokens on a sample.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}

import numpy as np

from luthier.data import parallel
from luthier.data.pack import fill, pack_bins
from luthier.data.prepare import prepare
from luthier.data.prepared import Prepared
from luthier.data.rows import ReadOptions
from luthier.runs.resolve import practice_folder
from luthier.spec.data import Data

# Made-up words of real lengths: what a tokenizer does with them does not matter, both sides use the same one.
_WORDS = ["".join(random.Random(n).choices("etaoinshrdlucmfwyp", k=2 + n * 7 % 9)) for n in range(400)]


def write_chat_rows(path: Path, count: int) -> None:
    """Chat rows of one or two exchanges and log-normal length, a third of them with a system message."""
    dice = random.Random(7)

    def words(mean: float) -> str:
        length = max(2, min(300, int(dice.lognormvariate(mean, 0.6))))
        return " ".join(dice.choices(_WORDS, k=length)).capitalize() + "."

    with path.open("w") as file:
        for number in range(count):
            messages = [{"role": "system", "content": "Answer briefly."}] if number % 3 == 0 else []
            for _ in range(1 + (number % 5 == 0)):
                messages.append({"role": "user", "content": f"{words(2.7)} ({number})"})
                messages.append({"role": "assistant", "content": words(3.4)})
            file.write(json.dumps({"messages": messages}) + "\n")


# -- C6: rows to cached tokens ----------------------------------------------------------------------------------


def model_with_template(folder: Path, source: str) -> Path:
    """The practice tokenizer with another chat template."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(practice_folder() / name, folder / name)
    (folder / "chat_template.jinja").write_text(source)
    return folder


def prepare_ours(rows: Path, model: Path, home: Path) -> Prepared:
    """Everything `luthier train` does to rows: checks, ledger, split, tokens, masks, all cold."""
    shutil.rmtree(home, ignore_errors=True)
    data = Data(train=str(rows), valid=0, max_length=4096)
    return prepare(ReadOptions(data, "sft", model), seed=0, home=home)


class Trl:
    """TRL's own preparation, as its trainer calls it when it is made."""

    def __init__(self, model: Path, source: str, folder: Path) -> None:
        import datasets
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        logging.disable(logging.WARNING)
        datasets.disable_progress_bars()
        self._folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._tokenizer.chat_template = source
        self._arguments = SFTConfig(
            output_dir=str(folder / "out"),
            assistant_only_loss=True,
            max_length=4096,
            report_to=[],
            bf16=False,
            use_cpu=True,
        )
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        self._trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(practice_folder()),
            self._arguments,
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=self._tokenizer,
        )

    def prepare(self, rows: Path, processes: int | None) -> Any:
        """From the file to input_ids and labels, with nothing cached."""
        import datasets

        cache = self._folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
        self._arguments.dataset_num_proc = processes
        return self._trainer._prepare_dataset(loaded, self._tokenizer, self._arguments, False, None, "train")


def same_tokens(ours: Prepared, theirs: Any, sample: int = 500) -> str:
    """Compare ids and trained tokens row by row on a sample."""
    indices = np.linspace(0, len(theirs) - 1, sample).astype(int)
    ids = masks = 0
    for index in indices.tolist():
        row = theirs[index]
        sequence = ours.sequences_of(index)[0]
        ids += ours.tokens_of(sequence).tolist() == row["input_ids"]
        masks += ours.trained_of(sequence).tolist() == [label != -100 for label in row["labels"]]
    return f"{ids}/{sample} rows with equal ids, {masks}/{sample} with equal masks"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure_preparation(folder: Path, count: int, rounds: int) -> None:
    """C6, interleaved."""
    rows = folder / "rows.jsonl"
    write_chat_rows(rows, count)
    templates = Path(__file__).parents[1] / "tests" / "templates"
    chatml, marked = ((templates / f"{name}.jinja").read_text() for name in ("chatml", "chatml_generation"))
    ours_chatml = model_with_template(folder / "chatml", chatml)
    published = importlib.util.find_spec("trl").submodule_search_locations[0]
    qwen3 = Path(published, "chat_templates", "qwen3.jinja").read_text()
    ours_qwen3 = model_with_template(folder / "qwen3", qwen3)
    trl = Trl(ours_chatml, marked, folder)
    sides: dict[str, Callable[[], Any]] = {
        "luthier, ChatML": lambda: prepare_ours(rows, ours_chatml, folder / "home"),
        "TRL, ChatML": lambda: trl.prepare(rows, None),
        "luthier, Qwen 3's full template": lambda: prepare_ours(rows, ours_qwen3, folder / "home3"),
        "TRL, ChatML, 2 processes": lambda: trl.prepare(rows, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, work in sides.items():
            took, results[name] = timed(work)
            seconds[name].append(took)
    summary = results["luthier, ChatML"].summary
    tokens = summary["tokens"]["train"]
    print(
        f"\nC6: {count:,} chat rows, {rows.stat().st_size / 1e6:.0f} MB, {tokens:,} tokens, {rounds} rounds interleaved"
    )
    print(f"    {same_tokens(results['luthier, ChatML'], results['TRL, ChatML'])}; tokenizer: {summary['tokenizer']}")
    base = statistics.median(seconds["TRL, ChatML"])
    for name, took in seconds.items():
        median = statistics.median(took)
        spread = f"{min(took):.2f} to {max(took):.2f} s"
        print(f"    {name:34} {count / median:>9,.0f} rows/s  {base / median:6.1f}x  ({spread})")


# -- C6: memory -------------------------------------------------------------------------------------------------


def tree_bytes(root: int) -> int:
    """Resident memory of a process and all below it."""
    children: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            sizes[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * 4096
            children.setdefault(int(fields[1]), []).append(int(folder.name))
        except OSError:
            continue
    waiting, total = [root], 0
    while waiting:
        process = waiting.pop()
        total += sizes.get(process, 0)
        waiting += children.get(process, [])
    return total


def _prepare_alone(rows: str, home: str) -> None:
    # With the same processes for small and large files, or their number would be what is measured.
    parallel.PARALLEL_BYTES = 0
    prepare_ours(Path(rows), practice_folder(), Path(home))


def peak_bytes(rows: Path, home: Path) -> int:
    """Peak resident memory of a preparation with all its processes."""
    process = multiprocessing.get_context("spawn").Process(target=_prepare_alone, args=(str(rows), str(home)))
    process.start()
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, tree_bytes(process.pid or 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.join()
    done.set()
    watcher.join()
    if process.exitcode:
        raise SystemExit("the preparation failed")
    return peak


def measure_memory(folder: Path, large: int) -> None:
    """C6: flat memory."""
    peaks = {}
    for count in (10_000, large):
        rows = folder / f"rows{count}.jsonl"
        write_chat_rows(rows, count)
        took, peaks[count] = timed(lambda rows=rows: peak_bytes(rows, folder / "memory"))
        print(f"    {count:>9,} rows: peak {peaks[count] / 1e6:,.0f} MB with all processes, {count / took:,.0f} rows/s")
        rows.unlink()
    print(f"    growth: {(peaks[large] - peaks[10_000]) / 1e6:,.0f} MB (aim: within 150 MB)")


# -- C7: packing ------------------------------------------------------------------------------------------------


def measure_packing(count: int, rounds: int) -> None:
    """C7, interleaved."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    dice = np.random.default_rng(3)
    lengths = np.clip(dice.lognormal(5.5, 0.8, count), 8, 2048).astype(np.int64)
    # TRL packs the tokens themselves; one column of them is the least it can be given.
    flat = np.zeros(int(lengths.sum()), np.int8)
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
    table = datasets.Dataset(pa.table({"input_ids": column}))
    ours, theirs = [], []
    for _ in range(rounds):
        took, bins = timed(lambda: pack_bins(lengths, 2048))
        ours.append(took)
        took, packed = timed(
            lambda: pack_dataset(table, 2048, "bfd", {"batch_size": count, "load_from_cache_file": False})
        )
        theirs.append(took)
    their_fill = lengths.sum() / (2048 * len(packed))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(f"\nC7: packing {count:,} lengths into 2,048, {rounds} rounds interleaved")
    print(f"    luthier       {a:7.2f} s  {b / a:6.1f}x  fill {fill(lengths, bins, 2048):.2%}")
    print(f"    TRL, one batch{b:7.2f} s          fill {their_fill:.2%} (it moves the tokens too)")


# -- C8: start-up -----------------------------------------------------------------------------------------------


def measure_start(folder: Path, rounds: int) -> None:
    """C8, interleaved."""
    spec = folder / "spec.toml"
    spec.write_text('[model]\nbase = "practice"\n[data]\ntrain = "rows.jsonl"\n[method]\nkind = "qlora"\n')
    tools = Path(sys.executable).parent
    commands = {
        "luthier --help": [str(tools / "luthier"), "--help"],
        "luthier train --help": [str(tools / "luthier"), "train", "--help"],
        "luthier spec check": [str(tools / "luthier"), "spec", "check", str(spec)],
        "trl sft --help": [str(tools / "trl"), "sft", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    # As installed: with compiled modules, which a first call of each may have to write.
    installed = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for number in range(rounds + 1):
        for name, command in commands.items():
            call = functools.partial(subprocess.run, command, check=True, capture_output=True, env=installed)
            took, _ = timed(call)
            if number:
                seconds[name].append(took)
    base = statistics.median(seconds["trl sft --help"])
    print(f"\nC8: start-up, {rounds} rounds interleaved")
    for name, took in seconds.items():
        print(f"    {name:22} {statistics.median(took):6.3f} s  {base / statistics.median(took):6.1f}x")


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000, help="rows of the memory measurement; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = ("luthier", "trl", "transformers", "datasets", "tokenizers", "gigatoken", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in names), f"- {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as folder:
        measure_start(Path(folder), options.rounds)
        measure_packing(1_000_000, options.rounds)
        measure_preparation(Path(folder), options.rows, options.rounds)
        if options.large:
            measure_memory(Path(folder), options.large)


if __name__ == "__main__":
    main()
