"""The Tinker service under its own SDK on this machine: `make bench-tinker`, or `python benchmarks/tinker_service.py`.

A server runs in processes of its own on a random model of 0.1 billion weights, and clients here train adapters of their
own on it, each waiting for its step before it sends the next. Two rows say what the server itself adds to a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# The SDK comes before a module of this folder that may be called as it is.
sys.path.append(sys.path.pop(0))
sys.path.insert(0, str(Path(__file__).parents[1]))

from inputs import SMALL, TINY, describe, write_text_files
from service import Connection

from tests.service.process import Server, running

RANK = 16
SHORTEST, LONGEST = 64, 256
OVERHEAD_MS = 5.0
_WEIGHTS = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""


def make_model(folder: Path, *, is_quick: bool) -> Path:
    """A random model; made in a process of its own, so that this one needs no torch."""
    write_text_files(folder, TINY if is_quick else SMALL)
    subprocess.run([sys.executable, "-c", _WEIGHTS, folder], check=True, capture_output=True)
    return folder


def draw(dice: random.Random, words: int) -> Any:
    """A row of 64 to 256 tokens."""
    import tinker

    tokens = [dice.randrange(10, words) for _ in range(dice.randint(SHORTEST, LONGEST) + 1)]
    count = len(tokens) - 1
    inputs = {
        "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[count]),
        "weights": tinker.TensorData(data=[1.0] * count, dtype="float32", shape=[count]),
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


class Trainer:
    """One client with an adapter of its own."""

    def __init__(self, server: Server, model: Path, number: int, words: int) -> None:
        import tinker

        service = tinker.ServiceClient(base_url=server.url, api_key=server.key)
        self.training = service.create_lora_training_client(str(model), rank=RANK, seed=number).result()
        self._adam = tinker.AdamParams(learning_rate=1e-4)
        self._dice = random.Random(number)
        self._words = words

    def train(self, until: float) -> list[tuple[float, int]]:
        """Steps until then: the seconds and tokens of each."""
        steps = []
        while (began := time.perf_counter()) < until:
            row = draw(self._dice, self._words)
            learnt = self.training.forward_backward([row], "cross_entropy")
            stepped = self.training.optim_step(self._adam)
            learnt.result()
            stepped.result()
            steps.append((time.perf_counter() - began, row.model_input.length))
        return steps


def measure_clients(server: Server, model: Path, count: int, seconds: float, words: int) -> None:
    """So many clients at a time, after one step each that is not counted."""
    with ThreadPoolExecutor(count) as threads:
        trainers = list(threads.map(lambda number: Trainer(server, model, number, words), range(count)))
        list(threads.map(lambda each: each.train(time.perf_counter() + 1e-3), trainers))
        began = time.perf_counter()
        done = list(threads.map(lambda each: each.train(began + seconds), trainers))
        took = time.perf_counter() - began
    steps = [step for each in done for step in each]
    waits = sorted(1000 * wait for wait, _ in steps)
    tokens = sum(each for _, each in steps)
    fewest, most = min(map(len, done)), max(map(len, done))
    print(
        f"{count:2} clients   {tokens / took:8,.0f} tokens/s   {len(steps) / took:6.2f} steps/s   "
        f"p50 {pick(waits, 0.5):7,.0f} ms   p95 {pick(waits, 0.95):7,.0f} ms   steps of a client {fewest} to {most}",
        flush=True,
    )


def pick(ordered: list[float], share: float) -> float:
    """The value below which this share lies."""
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


class Client(Connection):
    """The protocol by hand, with as little of a client's own work as can be."""

    async def post(self, path: str, facts: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer."""
        status, answer = await self.ask("POST", f"/api/v1/{path}", json.dumps(facts).encode())
        assert status == 200, (status, answer)
        return dict(json.loads(answer))

    async def finish(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The result of what was asked; the server holds the request until there is one."""
        while True:
            answer = await self.post("retrieve_future", {"request_id": asked["request_id"]})
            if answer.get("type") != "try_again":
                assert "error" not in answer, answer
                return answer


async def measure_overhead(server: Server, model: Path, count: int) -> bool:
    """What a request costs that computes next to nothing: a step of a small adapter that has no gradients."""
    connection = await Client(server).open()
    session = (await connection.post("create_session", {"tags": [], "sdk_version": "0.38.0"}))["session_id"]
    lora = {"rank": 1, "train_mlp": False, "train_attn": True, "train_unembed": False}
    create = {"session_id": session, "model_seq_id": 0, "base_model": str(model), "lora_config": lora}
    made = await connection.finish(await connection.post("create_model", create))

    async def beat(_: int) -> None:
        await connection.post("session_heartbeat", {"session_id": session})

    async def step(seq: int) -> None:
        adam = {"learning_rate": 0.0}
        asked = await connection.post("optim_step", {"model_id": made["model_id"], "seq_id": seq, "adam_params": adam})
        await connection.finish(asked)

    read = await time_each(beat, count)
    command = await time_each(step, count)
    halved = pick(command, 0.5) / 2
    print(f"a heartbeat           p50 {pick(read, 0.5):6.2f} ms   p95 {pick(read, 0.95):6.2f} ms")
    print(
        f"an empty optim_step   p50 {pick(command, 0.5):6.2f} ms   p95 {pick(command, 0.95):6.2f} ms, for two requests,"
    )
    holds = "yes" if halved < OVERHEAD_MS else "NO"
    print(
        f"the write of the log and the host: {halved:.2f} ms a request; under {OVERHEAD_MS:.0f} ms: {holds}", flush=True
    )
    return halved < OVERHEAD_MS


async def time_each(act: Callable[[int], Awaitable[None]], count: int) -> list[float]:
    """Milliseconds of each call, in order of length; the first ten are not counted."""
    took = []
    for number in range(1, count + 11):
        began = time.perf_counter()
        await act(number)
        took.append(1000 * (time.perf_counter() - began))
    return sorted(took[10:])


def main() -> int:
    """Measure; the result says whether the server itself is as quick as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", default="1,4,16", help="how many at a time, one row for each")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each row")
    parser.add_argument("--commands", type=int, default=300, help="of the rows about the server itself")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["TINKER_TELEMETRY"] = "0"
    shape = TINY if asked.quick else SMALL
    with tempfile.TemporaryDirectory() as place:
        model = make_model(Path(place) / "models" / "own" / "random", is_quick=asked.quick)
        print(f"{describe(shape)}, rank {RANK}, rows of {SHORTEST} to {LONGEST} tokens, load {os.getloadavg()[0]:.1f}")
        with running(Path(place), "--model", str(model)) as server:
            holds = asyncio.run(measure_overhead(server, model, asked.commands))
            for count in map(int, asked.clients.split(",")):
                measure_clients(server, model, count, asked.seconds, shape.words)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
