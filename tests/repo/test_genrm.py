"""The way of examples/genrm/ in small: raw rows, judgements, training, merge, certificate, measures, the next run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.calling import call

Captured = pytest.CaptureFixture[str]
SFT = Path("data/processed/sft")
# Steps and a batch. On Linux mlx takes seconds for a step of 16 rows: a few small ones show that perplexity falls.
SIZES = {"torch": (40, 16), "mlx": (4, 4)}


@pytest.fixture
def raw(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the raw rows of the example, fewer of them."""
    monkeypatch.chdir(tmp_path)
    script = root / "examples" / "genrm" / "make_data.py"
    sizes = ["--prompts", "200", "--pairs", "10", "--judgements", "30"]
    subprocess.run([sys.executable, str(script), *sizes], check=True, stdout=subprocess.DEVNULL)
    return tmp_path / "data" / "raw"


def judge(capsys: Captured, root: Path, source: Path, out: Path) -> Any:
    template = str(root / "examples" / "genrm" / "template.txt")
    reply = r"{critique}\ngrade: {score}"
    return call(capsys, "data", "judge", str(source), "-o", str(out), "--template", template, "--reply", reply)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_raw_row_is_accounted_for(raw: Path, root: Path, capsys: Captured) -> None:
    done = judge(capsys, root, raw / "scored.jsonl", SFT / "sft_genrm_train.jsonl")
    assert (done["rows"], done["written"]) == (407, 403)
    assert done["reasons"] == {"missing_key": 1, "score_off_scale": 1, "empty_content": 1, "not_json": 1}
    rejected = read(SFT / "sft_genrm_train.jsonl.rejected.jsonl")
    assert {each["reason"] for each in rejected} == done["reasons"].keys()
    assert sum(done["scores"].values()) == done["conversations"] == len(read(SFT / "sft_genrm_train.jsonl")) == 403
    parted = call(
        *(capsys, "data", "split", str(SFT / "sft_genrm_train.jsonl"), "--valid", "20", "--max-length", "2048"),
        *("--model", "practice", "--group-by", "prompt_id"),
        *("--train-out", str(SFT / "sft_train.jsonl"), "--valid-out", str(SFT / "sft_valid.jsonl")),
    )
    assert parted["reasons"] == {"duplicate": 1, "too_long": 2}
    assert parted["train"] + parted["valid"] + parted["dropped"] == 403
    train, valid = ({row["prompt_id"] for row in read(SFT / f"sft_{name}.jsonl")} for name in ("train", "valid"))
    assert not train & valid, "answers to one prompt stand on both sides"
    assert len(read(SFT / "sft_valid.jsonl")) == parted["valid"] == 20


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_from_raw_rows_to_a_certified_judge(engine: str, raw: Path, root: Path, capsys: Captured) -> None:
    test_every_raw_row_is_accounted_for(raw, root, capsys)
    call(capsys, "recipes", "copy", "genrm-practice", ".")
    steps, batch = SIZES[engine]
    size = ["--steps", str(steps), "--set", f"evaluate.every_steps={steps // 2}", "--set", f"optim.batch={batch}"]
    done = call(capsys, "train", "genrm-practice.toml", "--engine", engine, "--output-dir", "runs", *size)
    assert done["state"] == "finished"
    run = Path(done["folder"])
    assert json.loads((run / "certificate.json").read_text())["valid"] is True
    measured = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    perplexities = [each["perplexity"] for each in measured if "perplexity" in each]
    assert len(perplexities) == 2
    assert perplexities[1] < min(perplexities[0], 2000)  # a guess among its words would have 2,048
    if engine == "torch":
        measure(run, raw, root, capsys)
    after = call(
        *(capsys, "train", "--model", str(run / "merged_model"), "--data", str(raw / "judgements.jsonl")),
        *("--objective", "dpo", "--method", "lora", "--steps", "2", "--valid", "5", "--engine", engine),
        *("--output-dir", "next", "--set", "optim.batch=2"),
    )
    lineage = json.loads((Path(after["folder"]) / "lineage.json").read_text())
    assert str(run / "merged_model") in json.dumps(lineage)


def measure(run: Path, raw: Path, root: Path, capsys: Captured) -> None:
    """The judge is better than the base, and answers are held against pairs of which only the order is known."""
    compared = call(capsys, "compare", str(run), "--temperature", "0", "--max-tokens", "40")
    better = [name for name, entry in compared["metrics"].items() if entry["verdict"] == "better"]
    assert {"score readable", "score error", "held-out loss"} <= set(better)
    judge(capsys, root, raw / "pairs.jsonl", Path("pairs.jsonl"))
    asked = ["--data", "pairs.jsonl", "--max-tokens", "40", "--wrong", "0"]
    (tuned,) = call(capsys, "evaluate", str(run), *asked)["models"]
    assert (tuned["scores"]["rows"], tuned["scores"]["prompts"]) == (20, 10)
    assert "accuracy" not in tuned["scores"], "of a pair without scores only the order is known"
