"""Runs of the mlx engine to their end: certified, merged in full width, quantised again only where it survives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from luthier.adapters import requantise
from luthier.adapters.certificate import CERTIFICATE, check_certificate
from luthier.adapters.requantise import quantise_run
from luthier.adapters.verify import MergeOptions, is_outside, merge_outside, merge_run, verify_run
from luthier.cli.main import main
from luthier.engines.registry import choose_kind, load_sampler
from luthier.engines.verbs import SampleParams
from luthier.errors import CallError, ProofError, UnsupportedError
from luthier.runs.home import luthier_home
from luthier.runs.layout import FINAL_LORA_WEIGHTS, MERGED_MODEL
from luthier.runs.resolve import ResolvedModel, find_resolved
from luthier.runs.run import Run
from luthier.weights.mlx import write_mlx_adapter
from luthier.weights.peft import read_adapter
from luthier.weights.shards import read_model_files
from tests.unit.adapters.trained import save_model, train_run
from tests.unit.training.works import NEEDS_TORCH

pytest.importorskip("mlx_lm")
pytestmark = NEEDS_TORCH
MLX = {"engine.kind": "mlx"}
QLORA = {**MLX, "method.kind": "qlora"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return save_model(home / "base")


@pytest.fixture(scope="module")
def trained(home: Path, base: Path) -> dict[str, Path]:
    """A run of each method, for tests to copy."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LUTHIER_HOME", str(home))
    runs = {"lora": train_run(home / "lora", base, MLX), "qlora": train_run(home / "qlora", base, QLORA)}
    changes = {"engine.kind": "mlx", "method.kind": "full"}
    runs["full"] = _train_full(home / "full", base, changes)
    patch.undo()
    return {name: run.folder for name, run in runs.items()}


def _train_full(folder: Path, base: Path, changes: dict[str, Any]) -> Run:
    from luthier.training.session import train
    from tests.unit.training.works import make_work

    work = make_work(folder, {**changes, "model.base": str(base), "optim.steps": 4, "optim.learning_rate": 5e-3})
    assert train(work).outcome.is_done
    return work.run


@pytest.fixture
def copied(trained: dict[str, Path], tmp_path: Path) -> Any:
    def copy(method: str) -> Run:
        folder = trained[method]
        return Run(Path(shutil.copytree(folder, tmp_path / folder.name)))

    return copy


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_what_was_trained_is_certified_by_the_engine_that_trained_it(method: str, copied: Any) -> None:
    run = copied(method)
    certificate = verify_run(run)
    assert certificate.is_valid, [(each.claim, each.found) for each in certificate.broken]
    assert choose_kind(find_resolved(str(run.folder))) == "mlx"
    if method == "full":
        return
    merged = merge_run(run, None, MergeOptions())
    check_certificate(run)
    assert merged.certificate.is_valid
    assert merged.facts.changed_share > 0.5


def test_an_adapter_over_quantised_values_is_merged_in_full_width(copied: Any, base: Path, tmp_path: Path) -> None:
    """Over the base's own values, and over those that training saw; neither is quantised."""
    from luthier.engines.mlx.loading import build_dequantise

    run = copied("qlora")
    verify_run(run)
    merge_run(run, tmp_path / "own", MergeOptions())
    merged = merge_run(run, None, MergeOptions(nf4=True))
    assert merged.certificate.is_valid
    dequantise = build_dequantise(base, precision="fp32", bits=4)
    stored = read_model_files(base)["model.safetensors"]
    adapted, left = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    for folder, is_own in ((tmp_path / "own", True), (merged.folder, False)):
        found = read_model_files(folder)["model.safetensors"]
        assert {entry.dtype for entry in found.entries.values()} == {"BF16"}
        before = stored.read_floats(left)
        values = before if is_own else dequantise(left, before)
        assert np.abs(found.read_floats(left) - values).max() <= 2.0**-8 * np.abs(values).max()
        assert not np.array_equal(found.read_floats(adapted), stored.read_floats(adapted))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_quantised_again_it_is_held_against_the_full_model(method: str, copied: Any) -> None:
    run = copied(method)
    verify_run(run)
    made = quantise_run(run, None, 8, MergeOptions())
    assert made.folder == run.folder / f"{MERGED_MODEL}_8bit"
    assert made.certificate.is_valid
    assert orjson.loads((made.folder / CERTIFICATE).read_bytes())["valid"]
    assert orjson.loads((made.folder / "config.json").read_bytes())["quantization"]["bits"] == 8
    resolved = find_resolved(str(made.folder), with_weights=True)
    assert choose_kind(resolved) == "mlx"
    assert len(load_sampler(resolved, luthier_home()).sample([[5, 6, 7]], SampleParams(max_tokens=3))[0]) == 3
    check_certificate(run)  # of the run itself, which is as it was
    with pytest.raises(CallError, match="already there"):
        quantise_run(run, None, 8, MergeOptions())


def test_what_does_not_survive_is_refused_and_leaves_nothing(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in whose 4 bits the update is gone: the base is quantised in its place."""
    run = copied("lora")
    verify_run(run)
    merge_run(run, None, MergeOptions())
    start = find_resolved(run.spec.model.base).folder
    write = requantise.load_mlx_writer("write_quantised")
    gone = lambda folder, out, bits: write(start, out, bits)  # noqa: E731
    monkeypatch.setattr(requantise, "load_mlx_writer", lambda _: gone)
    with pytest.raises(ProofError, match="what was learned survives") as error:
        quantise_run(run, None, 4, MergeOptions())
    assert "100.0% of an effect" in error.value.message
    assert "--quantise 8" in error.value.hint
    assert not list(run.folder.glob(f"{MERGED_MODEL}_*"))
    with pytest.raises(CallError, match="--quantise 3"):
        quantise_run(run, None, 3, MergeOptions())


def test_an_adapter_of_mlx_lm_is_merged_and_asked(
    copied: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies in no run: its base by its own file, its certificate about base + adapter alone."""
    run = copied("lora")
    config, tensors = read_adapter(run.folder / FINAL_LORA_WEIGHTS)
    folder = tmp_path / "outside" / "adapters"
    write_mlx_adapter(folder, config, tensors, layers=3)
    told = orjson.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_bytes(orjson.dumps({**told, "model": str(base)}))
    assert is_outside(str(folder))
    assert not is_outside(str(run.folder))
    assert not is_outside(str(run.folder / FINAL_LORA_WEIGHTS))
    assert main(["merge", str(folder), "-o", str(tmp_path / "merged")]) == 0
    assert "every tensor of base and adapter has its place" in capsys.readouterr().out
    verify_run(run)
    own = merge_run(run, tmp_path / "own", MergeOptions()).folder
    one, other = (read_model_files(each)["model.safetensors"] for each in (tmp_path / "merged", own))
    assert all(np.array_equal(one.read_floats(name), other.read_floats(name)) for name in other.entries)
    asked = [[5, 6, 7, 8]], SampleParams(max_tokens=4)
    answers = [
        load_sampler(find_resolved(str(each), with_weights=True), luthier_home(), "mlx").sample(*asked)
        for each in (folder, tmp_path / "merged")
    ]
    assert answers[0] == answers[1]
    with pytest.raises(CallError, match="say where"):
        merge_outside(str(folder), None, MergeOptions())


def test_a_base_that_mlx_lm_quantised_is_dequantised_before_it_is_merged(base: Path, tmp_path: Path) -> None:
    """mlx-lm#1172: fused into 4 bits, most of an update is rounded away; here the merged model is in full width."""
    from luthier.engines.mlx.loading import write_quantised

    small = tmp_path / "base-4bit"
    write_quantised(base, small, 4)
    with pytest.raises(UnsupportedError, match="quantised by mlx_lm to 4 bits"):
        train_run(tmp_path / "torch", small)
    run = train_run(tmp_path / "mlx", small, QLORA)
    certificate = verify_run(run)
    assert certificate.is_valid, [(each.claim, each.found) for each in certificate.broken]
    merged = merge_run(run, None, MergeOptions())
    assert merged.certificate.is_valid
    (live,) = (each for each in merged.certificate.claims if each.claim.endswith("said (log-probabilities)"))
    assert "stated" not in live.allowed  # it is judged: there are no other values than those that training saw
    kinds = {e.dtype for file in read_model_files(merged.folder).values() for e in file.entries.values()}
    assert kinds == {"BF16"}
    assert "quantization" not in orjson.loads((merged.folder / "config.json").read_bytes())
    assert quantise_run(run, None, 8, MergeOptions()).certificate.is_valid
    # torch reads what was merged, though it does not read what it was merged from.
    asked = [[5, 6, 7, 8]], SampleParams(max_tokens=4)
    plain = ResolvedModel(merged.folder)
    answers = [load_sampler(plain, luthier_home(), kind).sample(*asked) for kind in ("torch", "mlx")]
    assert len(answers[0][0]) == len(answers[1][0]) == 4


def test_the_next_run_starts_from_the_values_of_the_one_before(copied: Any, tmp_path: Path) -> None:
    first = copied("qlora")
    second = train_run(tmp_path / "second", first.folder, QLORA)
    certificate = verify_run(second)
    assert certificate.is_valid, [(each.claim, each.found) for each in certificate.broken]
    assert merge_run(second, None, MergeOptions(nf4=True)).certificate.is_valid
    with pytest.raises(UnsupportedError, match="does not have"):
        train_run(tmp_path / "third", first.folder, {"method.kind": "lora"})
