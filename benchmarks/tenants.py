"""Joined batches of many adapters against one adapter after another: `python benchmarks/tenants.py`.

No server and no wire: the process's own parts are asked, on a random model, by turns in one run. Each round of a row
is a `forward_backward` and an `optim_step` of every adapter. Losses and gradient norms of both ways must agree, else
the row is void. Seconds are those of the clock; on a shared machine, those of the processor waver less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that sleep while they wait, as in a host's process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from inputs import QWEN3_06B, QWEN3_8B, SMALL, TINY, Shape, describe, write_text_files

SHAPES = {"tiny": TINY, "0.1b": SMALL, "0.6b": QWEN3_06B, "8b": QWEN3_8B}
RANK = 16
_WEIGHTS = """
import sys, torch, transformers
torch.manual_seed(0)
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""


@dataclass
class Way:
    """One way to compute: what it took, and what it told."""

    seconds: list[float]
    cpu_seconds: list[float]
    told: list[tuple[float, float]]


def make_model(folder: Path, shape: Shape) -> Path:
    """A random model; made in a process of its own."""
    write_text_files(folder, shape)
    subprocess.run([sys.executable, "-c", _WEIGHTS, folder], check=True, capture_output=True)
    return folder


def open_tenants(folder: Path, precision: str) -> Any:
    """Adapters in training over the model, as a host has them."""
    from luthier.engines.surroundings import prepare_process

    prepare_process()
    from luthier.engines.torch.decoding import build_decoder
    from luthier.runs.resolve import ResolvedModel

    return build_decoder(ResolvedModel(folder, name="random"), folder, precision=precision).tenants()


class Desk:
    """A queue that is worked off here."""

    def __init__(self, tenants: Any) -> None:
        from luthier.host.training import Training

        self.training = Training(tenants, lambda: None)
        self._told: dict[int, Any] = {}
        self._number = 0

    def ask(self, kind: str, model: str, body: bytes = b"", **facts: Any) -> int:
        """One work, not begun yet."""
        from luthier.host.work import Work

        self._number += 1
        self.training.submit(
            Work(self._number, kind, model, facts, body), lambda done: self._told.update({done.id: done})
        )
        return self._number

    def run(self) -> None:
        """All that is asked."""
        while self.training.has_work():
            self.training.work()

    def take(self, number: int) -> Any:
        """What became of it."""
        done = self._told.pop(number)
        assert done.error is None, done.error
        return done


def draw_request(model: str, dice: np.random.Generator, least: int, most: int, words: int) -> bytes:
    """One row, of which 60 % is trained."""
    from luthier.host.datums import Datum, LossRequest, write_loss_request

    count = int(dice.integers(least, most + 1))
    tokens = dice.integers(10, words, count + 1)
    weights = (np.arange(count) >= 0.4 * count).astype(np.float32)
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})
    return write_loss_request(LossRequest(model, 1, (datum,), "cross_entropy"))


def play(desk: Desk, bodies: dict[str, bytes], way: Way, *, joined: bool) -> None:
    """One round: each adapter computes and steps, together or one after another."""
    from luthier.host.datums import read_loss_output

    asked = []
    began, began_cpu = time.perf_counter(), time.process_time()
    for model, body in bodies.items():
        asked.append((desk.ask("forward_backward", model, body), desk.ask("optim_step", model, learning_rate=1e-4)))
        if not joined:
            desk.run()
    desk.run()
    _wait()
    way.seconds.append(time.perf_counter() - began)
    way.cpu_seconds.append(time.process_time() - began_cpu)
    for passed, stepped in asked:
        loss = read_loss_output(desk.take(passed).body).metrics["loss:sum"]
        way.told.append((loss, desk.take(stepped).facts["metrics"]["grad_norm"]))


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(desk: Desk, count: int, least: int, most: int, rounds: int, words: int) -> None:
    """One row of the table."""
    from luthier.host.datums import read_loss_request

    ways = {joined: Way([], [], []) for joined in (True, False)}
    names = {joined: [f"{joined}-{number}" for number in range(count)] for joined in ways}
    for models in names.values():
        for number, model in enumerate(models):
            desk.ask("open", model, rank=RANK, seed=number, train_unembed=False)
    desk.run()
    dice = np.random.default_rng(count)
    tokens = []
    for turn in range(rounds + 1):
        drawn = [draw_request("m", dice, least, most, words) for _ in range(count)]
        tokens.append(sum(len(datum.tokens) for body in drawn for datum in read_loss_request(body).data))
        for joined in (True, False) if turn % 2 else (False, True):
            play(desk, dict(zip(names[joined], drawn, strict=True)), ways[joined], joined=joined)
    for models in names.values():
        for model in models:
            desk.ask("drop", model)
    desk.run()
    show(count, least, most, tokens[1:], ways[True], ways[False])


def show(count: int, least: int, most: int, tokens: list[int], joined: Way, apart: Way) -> None:
    """The first round pays for what later ones reuse, and is left out."""
    away = max(
        abs(one - other) / abs(other)
        for pair in zip(joined.told, apart.told, strict=True)
        for one, other in zip(*pair, strict=True)
    )
    ratios = [one / other for one, other in zip(apart.seconds[1:], joined.seconds[1:], strict=True)]
    cpu = [one / other for one, other in zip(apart.cpu_seconds[1:], joined.cpu_seconds[1:], strict=True)]
    speed = statistics.median(n / seconds for n, seconds in zip(tokens, joined.seconds[1:], strict=True))
    alone = statistics.median(n / seconds for n, seconds in zip(tokens, apart.seconds[1:], strict=True))
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    lengths = f"{least}-{most}" if least < most else str(least)
    verdict = "" if away < 0.02 else "  VOID: they do not agree"
    print(
        f"| {count:>2} | {lengths:>7} | {speed:>8,.0f} | {alone:>8,.0f} | {statistics.median(ratios):.2f} ({spread}) "
        f"| {statistics.median(cpu):.2f} | {away:.1e} |{verdict}",
        flush=True,
    )


def main() -> int:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="0.1b")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--adapters", default="1,4,16", help="how many at a time, one row for each")
    parser.add_argument("--lengths", default="64,256,64-256", help="tokens of a request, a table's part for each")
    parser.add_argument("--rounds", type=int, default=4)
    wanted = parser.parse_args()
    shape = SHAPES[wanted.model]
    with tempfile.TemporaryDirectory() as place:
        desk = Desk(open_tenants(make_model(Path(place) / "model", shape), wanted.precision))
        print(f"{describe(shape)}; {wanted.precision}; rank {RANK}; {wanted.rounds} rounds\n")
        print("| adapters | tokens | joined tok/s | one by one | ratio (spread) | ratio, cpu | apart by |")
        print("|---|---|---|---|---|---|---|")
        for lengths in wanted.lengths.split(","):
            least, _, most = lengths.partition("-")
            for count in wanted.adapters.split(","):
                measure(desk, int(count), int(least), int(most or least), wanted.rounds, shape.words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
