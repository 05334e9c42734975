"""Exports of a run: complete or not there, with a certificate or written down as without, and readable by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from luthier.adapters import export as exporting
from luthier.adapters import merge
from luthier.adapters.certificate import CERTIFICATE, check_certificate
from luthier.adapters.export import ExportOptions, default_folder, export_run
from luthier.adapters.merge import Stopped, merge_adapter
from luthier.cli.main import app, main
from luthier.errors import CallError, ModelError, ProofError, RunError, UnsupportedError
from luthier.runs.layout import MERGED_MODEL
from luthier.runs.manifest import check_manifest, hash_file
from luthier.runs.resolve import practice_folder
from luthier.runs.run import Run
from luthier.weights.mlx import read_mlx_adapter
from luthier.weights.peft import read_adapter
from luthier.weights.shards import read_model_files
from tests.unit.adapters.runs import certified, finished_run, uncertified
from tests.unit.runs.made import build_spec, make_run, write_rows

WITH = ExportOptions(certified)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finished_run(tmp_path)


def gguf_numbers(path: Path) -> dict[str, np.ndarray]:
    import gguf

    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(path).tensors}


def floats(folder: Path) -> dict[str, np.ndarray]:
    return {name: file.read_floats(name) for file in read_model_files(folder).values() for name in file.entries}


def test_peft_is_the_adapter_as_it_was_sealed(run: Run, tmp_path: Path) -> None:
    facts = export_run(run, "peft", tmp_path / "out", WITH)
    assert set(facts.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    final = run.final_weights
    assert final is not None
    assert all((tmp_path / "out" / name).read_bytes() == (final / name).read_bytes() for name in facts.files)
    assert check_manifest(tmp_path / "out")["run"] == run.id
    assert facts.size_bytes == sum(facts.files.values())


def test_merged_is_what_merging_makes_and_nothing_is_left_beside_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    facts = export_run(run, "merged", out, WITH)
    assert run.final_weights is not None
    merge_adapter(practice_folder(), [run.final_weights], tmp_path / "expected")
    expected, found = floats(tmp_path / "expected"), floats(out)
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    assert "tokenizer.json" in facts.files
    assert "generation_config.json" in facts.files
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_mlx_is_the_adapter_under_other_names(run: Run, tmp_path: Path) -> None:
    facts = export_run(run, "mlx", tmp_path / "out", WITH)
    config, tensors = read_mlx_adapter(tmp_path / "out")
    assert run.final_weights is not None
    given, expected = read_adapter(run.final_weights)
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], values) for name, values in expected.items())
    assert config.scale == given.scale
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())["num_layers"] == 2
    assert set(facts.files) == {"adapter_config.json", "adapters.safetensors"}


@pytest.mark.parametrize("kind", ["own", "q8_0"])
def test_gguf_holds_the_merged_weights(run: Run, tmp_path: Path, kind: str) -> None:
    facts = export_run(run, "gguf", tmp_path / "out", ExportOptions(certified, quantise=kind))
    assert run.final_weights is not None
    merge_adapter(practice_folder(), [run.final_weights], tmp_path / "merged")
    merged, base = floats(tmp_path / "merged"), floats(practice_folder())
    found = gguf_numbers(tmp_path / "out" / "model.gguf")
    name, own = "blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"
    largest = np.abs(merged[own]).max()
    assert np.abs(found[name] - merged[own]).max() <= (largest / 200 if kind == "q8_0" else 0)
    assert np.abs(found[name] - base[own]).max() > largest / 50
    assert 0 <= facts.details["largest_error"] <= (max(np.abs(each).max() for each in merged.values()) / 200)
    assert (facts.details["largest_error"] == 0) is (kind == "own")
    assert facts.details["kind"] == ("bf16" if kind == "own" else kind)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "manifest.json"] == ["model.gguf"]


def test_ollama_is_gguf_and_a_modelfile(run: Run, tmp_path: Path) -> None:
    facts = export_run(run, "ollama", tmp_path / "out", ExportOptions(certified, quantise="q8_0"))
    assert set(facts.files) == {"Modelfile", "model.gguf"}
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert facts.details["stops"] == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("to", ["gguf", "mlx", "ollama", "peft"])
def test_an_export_says_on_what_certificate_it_stands(run: Run, tmp_path: Path, to: Any) -> None:
    claim = {"artefact": "final_lora_weights", "claim": "a", "found": "b", "allowed": "c", "holds": True}
    told = {"valid": True, "artefact": "final_lora_weights", "made": "today", "claims": [claim], "files": {}}
    (run.folder / CERTIFICATE).write_text(json.dumps(told))
    export_run(run, to, tmp_path / "out", WITH)
    manifest = check_manifest(tmp_path / "out")
    ground = {
        "artefact": "final_lora_weights",
        "claims": 1,
        "made": "today",
        "sha256": hash_file(run.folder / CERTIFICATE),
    }
    assert (manifest["model"], manifest["certificate"]) == (run.model_id, ground)
    (entry,) = run.lineage["exports"]
    assert (entry["to"], entry["folder"], entry["certificate"]) == (to, str(tmp_path / "out"), ground)
    assert entry["files"] == {name: facts["sha256"] for name, facts in manifest["files"].items()}
    export_run(run, to, tmp_path / "bare", ExportOptions(None))
    assert check_manifest(tmp_path / "bare")["certificate"] is None
    assert [each["certificate"] for each in run.lineage["exports"]] == [ground, None]


def test_an_adapter_that_mlx_lm_would_read_otherwise_is_found(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporting.write_mlx_adapter
    monkeypatch.setattr(
        exporting,
        "write_mlx_adapter",
        lambda draft, config, tensors, layers: write(
            draft, config, {name: values * 2 for name, values in tensors.items()}, layers=layers
        ),
    )
    with pytest.raises(ProofError, match="does not hold what was written"):
        export_run(run, "mlx", tmp_path / "out", WITH)
    assert not (tmp_path / "out").exists()


def test_the_run_s_own_merged_model_is_used_where_it_is_there(run: Run, tmp_path: Path) -> None:
    assert run.final_weights is not None
    merge_adapter(practice_folder(), [run.final_weights], run.folder / MERGED_MODEL, dtype="fp32")
    facts = export_run(run, "gguf", tmp_path / "out", WITH)
    assert facts.details["kind"] == "f32"
    path = run.folder / MERGED_MODEL / "config.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ModelError, match="damaged"):
        export_run(run, "merged", tmp_path / "other", WITH)


def test_a_run_in_full_has_a_model_and_no_adapter(tmp_path: Path) -> None:
    run = finished_run(tmp_path, kind="full")
    with pytest.raises(CallError, match="no adapter"):
        export_run(run, "peft", tmp_path / "out", WITH)
    for to in ("merged", "mlx"):
        facts = export_run(run, to, tmp_path / to, WITH)  # type: ignore[arg-type]
        assert facts.files["model.safetensors"] == (practice_folder() / "model.safetensors").stat().st_size
    export_run(run, "gguf", tmp_path / "gguf", ExportOptions(certified, quantise="f32"))
    assert np.array_equal(
        gguf_numbers(tmp_path / "gguf" / "model.gguf")["blk.0.attn_q.weight"],
        floats(practice_folder())["model.layers.0.self_attn.q_proj.weight"],
    )


def test_a_template_of_the_run_s_own_goes_along(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}[assistant] ")
    run = finished_run(tmp_path, model={"base": "practice", "chat_template": str(template)})
    export_run(run, "merged", tmp_path / "merged", WITH)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == template.read_text()
    export_run(run, "ollama", tmp_path / "ollama", WITH)
    assert "{{ else }}[user] {{ end }}" in (tmp_path / "ollama" / "Modelfile").read_text()


def test_a_template_that_ollama_cannot_have_is_said_before_anything_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ loop.index }}{{ m.content }}<|im_end|>{% endfor %}")
    run = finished_run(tmp_path, model={"base": "practice", "chat_template": str(template)})
    monkeypatch.setattr(exporting, "merge_adapter", None)
    with pytest.raises(UnsupportedError, match="no Ollama template"):
        export_run(run, "ollama", tmp_path / "out", ExportOptions(None))
    assert not (tmp_path / "out").exists()
    assert "without_certificate" not in run.lineage


def test_an_adapter_over_another_run_s_result_is_merged_in_order_and_noted(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "one")
    second = finished_run(tmp_path / "two", base=first.model_id, seed=1)
    assert "merged model" in export_run(second, "peft", tmp_path / "peft", WITH).notes[0]
    export_run(second, "merged", tmp_path / "out", WITH)
    adapters = [run.final_weights for run in (first, second) if run.final_weights]
    merge_adapter(practice_folder(), adapters, tmp_path / "expected")
    name = "model.layers.3.mlp.down_proj.weight"
    assert np.array_equal(floats(tmp_path / "out")[name], floats(tmp_path / "expected")[name])


def test_what_is_merged_on_the_way_is_worked_out_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = merge._Change.add_to
    monkeypatch.setattr(merge._Change, "add_to", lambda self, values, part: 2 * add(self, values, part) - values)
    with pytest.raises(ProofError, match=r"down_proj\.weight` is not the base's plus scale \* B @ A"):
        export_run(run, "merged", tmp_path / "out", WITH)
    assert not (tmp_path / "out").exists()


# -- certificates ----------------------------------------------------------------------------------------------------


def test_without_a_valid_certificate_nothing_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ProofError, match="not valid"):
        export_run(run, "merged", tmp_path / "out", ExportOptions(uncertified))
    assert not (tmp_path / "out").exists()
    assert "without_certificate" not in run.lineage


def test_going_without_a_certificate_is_recorded_each_time(run: Run, tmp_path: Path) -> None:
    export_run(run, "peft", tmp_path / "out", ExportOptions(None))
    export_run(run, "mlx", tmp_path / "other", ExportOptions(None))
    recorded = run.lineage["without_certificate"]
    assert [entry["what"] for entry in recorded] == [
        f"export to peft: {tmp_path / 'out'}",
        f"export to mlx: {tmp_path / 'other'}",
    ]
    assert all(entry["time"].startswith("20") for entry in recorded)


def test_the_check_of_certificates_refuses_a_run_without_one(run: Run) -> None:
    with pytest.raises(ProofError):
        check_certificate(run)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(CallError, match="already there"):
        export_run(run, "peft", tmp_path / "there", WITH)
    with pytest.raises(CallError, match="no such target: onnx"):
        export_run(run, "onnx", tmp_path / "out", WITH)  # type: ignore[arg-type]
    with pytest.raises(CallError, match="no such type: q2"):
        export_run(run, "gguf", tmp_path / "out", ExportOptions(certified, quantise="q2"))
    with pytest.raises(CallError, match="not of merged"):
        export_run(run, "merged", tmp_path / "out", ExportOptions(certified, quantise="q8_0"))
    assert run.final_weights is not None
    (run.final_weights / "README.md").write_text("changed")
    with pytest.raises(ModelError, match=r"damaged.*README\.md"):
        export_run(run, "peft", tmp_path / "out", WITH)
    unfinished = make_run(tmp_path / "more", build_spec(write_rows(tmp_path / "rows.jsonl")))
    with pytest.raises(RunError, match="no final weights yet"):
        export_run(unfinished, "peft", tmp_path / "out", WITH)


@pytest.mark.parametrize("to", ["merged", "gguf", "ollama"])
def test_asked_to_stop_nothing_is_left(run: Run, tmp_path: Path, to: Any) -> None:
    out = tmp_path / "place" / "out"
    with pytest.raises(Stopped):
        export_run(run, to, out, ExportOptions(certified, should_stop=lambda: True))
    assert list(out.parent.iterdir()) == []


def test_the_place_when_nobody_says(run: Run) -> None:
    assert default_folder(run, "gguf", "q8_0") == run.folder / "exports" / "gguf_q8_0"
    facts = export_run(run, "peft", None, WITH)
    assert facts.folder == run.folder / "exports" / "peft"


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_refuses_without_a_certificate_and_goes_on_when_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["export", str(run.folder), "--to", "ollama", "--quantise", "q8_0", "-o", str(tmp_path / "out")]
    assert main(call) == 1
    assert "certificate" in capsys.readouterr().err
    assert main([*call, "--without-certificate"]) == 0
    shown = capsys.readouterr()
    assert "ollama create NAME -f" in shown.out
    assert "warning: llama.cpp does not compose characters" in shown.err
    assert main(["export", run.id, "--to", "peft", "-o", str(tmp_path / "p"), "--without-certificate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["adapter_config.json"] > 100


def test_the_command_knows_the_targets_and_types_of_the_code() -> None:
    from luthier.cli.commands.export import _KINDS, _TARGETS

    assert _TARGETS == exporting.TARGETS
    assert set(_KINDS) == {"own", *exporting.KINDS}
    shown = CliRunner().invoke(app, ["export", "--help"]).output
    assert all(target in shown for target in _TARGETS)
