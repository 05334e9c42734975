"""Every way a merge or an adapter can be wrong is planted, and the certificate finds each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.adapters import fresh, merge, verify
from luthier.adapters.certificate import CERTIFICATE, Certificate, check_certificate, find_certificate
from luthier.adapters.claims import Order
from luthier.adapters.merge import Stopped
from luthier.adapters.verify import MergeOptions, merge_run, verify_run
from luthier.cli.main import main
from luthier.errors import CallError, DataError, ProofError, RunError
from luthier.runs.layout import FINAL_LORA_WEIGHTS, FINAL_MODEL, MERGED_MODEL, PROBE
from luthier.runs.manifest import check_manifest
from luthier.runs.run import Run
from tests.unit.adapters.trained import (
    SQUARE,
    Fault,
    Tensors,
    add_again,
    change,
    merge_plainly,
    read_tensors,
    save_model,
    train_run,
    with_json,
    with_tensors,
)
from tests.unit.training.works import NEEDS_TORCH

pytestmark = NEEDS_TORCH
ADAPTER = "adapter_model.safetensors"
PEFT = "base_model.model.model.layers.1.self_attn.q_proj"
SUMS = "every number is the base's plus scale * B @ A"
PLACES = "every tensor of base and adapter has its place, none is left over"
FINITE = "every weight is a finite number"
SEALED = "every byte is as it was sealed"
LOGITS = "it says what base + adapter say (logits)"
IS_IN = "the adapter is in it: it differs from the base"
LIVE = "it says what the live model said (log-probabilities of every token)"
TEXT = "tokenizer and template give the ids that they gave in training"
STOPS = "the same tokens end an answer"
MOVED = "it differs from what it was trained from by more than noise"
TARGETS = "every layer that the adapter names has its tensors"
KEYS = "every tensor of the adapter has its place in the model"
BASE = "the base is the one that the run was trained on"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    return save_model(home / "base")


@pytest.fixture(scope="module")
def made(home: Path, base: Path) -> Path:
    """A run with a merged model that nobody has certified."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LUTHIER_HOME", str(home))
    run = train_run(home / "made", base)
    patch.undo()
    merge_plainly(run, base)
    return run.folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(made, tmp_path / made.name)))


def alone(run: Run) -> Run:
    shutil.rmtree(run.folder / MERGED_MODEL)
    return run


def broken(certificate: Certificate) -> set[str]:
    assert not certificate.is_valid
    return {each.claim for each in certificate.broken}


# -- what is right ---------------------------------------------------------------------------------------------------


def test_what_is_right_is_certified(run: Run) -> None:
    certificate = verify_run(run)
    assert certificate.broken == []
    assert certificate.artefact == MERGED_MODEL
    assert {each.artefact for each in certificate.claims} == {FINAL_LORA_WEIGHTS, MERGED_MODEL}
    assert len(certificate.claims) == 20
    written = json.loads((run.folder / CERTIFICATE).read_bytes())
    assert written["valid"] is True
    assert written["files"].keys() >= {f"{FINAL_LORA_WEIGHTS}/{ADAPTER}", f"{MERGED_MODEL}/model.safetensors"}
    assert all(len(digest) == 64 for digest in written["files"].values())
    assert find_certificate(run) == certificate
    check_certificate(run)


def test_an_adapter_is_certified_by_itself(run: Run) -> None:
    certificate = verify_run(alone(run))
    assert certificate.broken == []
    assert (certificate.artefact, len(certificate.claims)) == (FINAL_LORA_WEIGHTS, 10)
    check_certificate(run)


# -- faults in a merged model ----------------------------------------------------------------------------------------


def swapped_words(table: dict[str, Any]) -> None:
    words = table["model"]["vocab"]
    one, other = [word for word in words if word.isalpha()][:2]
    words[one], words[other] = words[other], words[one]


def plant(base: Path, name: str) -> Fault:
    """Each fault, and claims that must not hold."""
    of_base = read_tensors(base)
    embeddings = of_base["model.embed_tokens.weight"]
    found: dict[str, Fault] = {
        "adapter dropped": add_again(base, 0.0),
        "twice the scale": add_again(base, 2.0),
        "a scale a tenth off": add_again(base, 1.1),
        "the update turned around": add_again(base, 1.0, SQUARE, turned=True),
        "one layer missed": add_again(base, 0.0, "layers.2.mlp.down_proj"),
        "a weight transposed": with_tensors(lambda found: found.update({SQUARE: found[SQUARE].T})),
        "one number changed": with_tensors(lambda found: found["model.norm.weight"][:1].mul_(1.5)),
        "not a number": with_tensors(lambda found: found[SQUARE][:1, :1].fill_(float("nan"))),
        "infinite": with_tensors(lambda found: found["model.norm.weight"][:1].fill_(float("inf"))),
        "a key left over": with_tensors(lambda found: found.update({"model.extra": found[SQUARE] * 1})),
        "a key missing": with_tensors(lambda found: found.pop(SQUARE)),
        "another head": with_tensors(lambda found: found.update({"lm_head.weight": embeddings * 2})),
        "tokens swapped": with_json("tokenizer.json", swapped_words),
        "another template": with_json("tokenizer_config.json", lambda table: table.update(chat_template="hello")),
        "another stop token": with_json("generation_config.json", lambda table: table.update(eos_token_id=7)),
        "no stop token": lambda folder: (folder / "generation_config.json").unlink(),
    }
    return found[name]


FAULTS = {
    "adapter dropped": {SUMS, IS_IN, LOGITS},
    "twice the scale": {SUMS, LOGITS},
    "a scale a tenth off": {SUMS},
    "the update turned around": {SUMS},
    "one layer missed": {SUMS},
    "a weight transposed": {SUMS, LOGITS},
    "one number changed": {SUMS},
    "not a number": {FINITE, LOGITS},
    "infinite": {FINITE},
    "a key left over": {PLACES},
    "a key missing": {PLACES},
    "another head": {SUMS},
    "tokens swapped": {TEXT},
    "another template": {TEXT},
    "another stop token": {STOPS},
    "no stop token": {STOPS},
}
"""Each fault, and claims that must not hold."""


_FAST = ("adapter dropped", "one layer missed", "a weight transposed", "a key left over", "another stop token")


@pytest.mark.parametrize(
    "name", [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_in_the_merged_model_is_found(name: str, run: Run, base: Path) -> None:
    change(run.folder / MERGED_MODEL, plant(base, name))
    found = verify_run(run)
    assert FAULTS[name] <= broken(found)
    assert {each.artefact for each in found.broken} == {MERGED_MODEL}
    with pytest.raises(ProofError, match="not valid"):
        check_certificate(run)


def test_another_base_under_the_adapter_is_found(run: Run, home: Path) -> None:
    other = save_model(home / "other", seed=7)
    shutil.rmtree(run.folder / MERGED_MODEL)
    merge_plainly(run, other)
    assert {SUMS, LOGITS} <= broken(verify_run(run))


@pytest.mark.slow
def test_a_merge_of_an_earlier_checkpoint_is_found(run: Run, base: Path) -> None:
    shutil.rmtree(run.folder / MERGED_MODEL)
    merge_plainly(run, base, run.folder / "checkpoint_step_2")
    assert SUMS in broken(verify_run(run))


def test_a_file_that_changed_after_the_seal_is_found(run: Run) -> None:
    with_json("config.json", lambda table: table.update(rms_norm_eps=0.1))(run.folder / MERGED_MODEL)
    assert SEALED in broken(verify_run(run))


@pytest.mark.slow
def test_a_merge_that_the_rounding_took_away_is_found(base: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, base, {"optim.learning_rate": 2e-5, "optim.steps": 2})
    merge_plainly(run, base)
    assert broken(verify_run(run)) == {IS_IN}


# -- faults in an adapter --------------------------------------------------------------------------------------------


def swap_layers(tensors: Tensors) -> None:
    for side in ("lora_A", "lora_B"):
        one, other = (f"base_model.model.model.layers.{n}.self_attn.q_proj.{side}.weight" for n in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]


def move_out(tensors: Tensors) -> None:
    for side in ("lora_A", "lora_B"):
        tensors[f"{PEFT.replace('layers.1', 'layers.9')}.{side}.weight"] = tensors.pop(f"{PEFT}.{side}.weight")


ADAPTER_FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "twice the scale": (with_json("adapter_config.json", lambda table: table.update(lora_alpha=64)), {LIVE}),
    "B is zero": (
        with_tensors(lambda found: [each.zero_() for key, each in found.items() if "lora_B" in key], ADAPTER),
        {LIVE, MOVED},
    ),
    "one layer is zero": (with_tensors(lambda found: found[f"{PEFT}.lora_B.weight"].zero_(), ADAPTER), {LIVE}),
    "two layers swapped": (with_tensors(swap_layers, ADAPTER), {LIVE}),
    "a layer left out": (
        with_tensors(lambda found: [found.pop(f"{PEFT}.{side}.weight") for side in ("lora_A", "lora_B")], ADAPTER),
        {TARGETS, LIVE},
    ),
    "a key left over": (with_tensors(move_out, ADAPTER), {TARGETS, KEYS}),
    "not a number": (
        with_tensors(lambda found: found[f"{PEFT}.lora_B.weight"][:1].fill_(float("nan")), ADAPTER),
        {"the adapter is whole"},
    ),
}


@pytest.mark.parametrize("name", ADAPTER_FAULTS)
def test_a_fault_in_the_adapter_is_found(name: str, run: Run) -> None:
    fault, wanted = ADAPTER_FAULTS[name]
    change(alone(run).folder / FINAL_LORA_WEIGHTS, fault)
    assert wanted <= broken(verify_run(run))


def test_the_adapter_of_an_earlier_checkpoint_is_found(run: Run) -> None:
    stale = run.folder / "checkpoint_step_2" / ADAPTER
    change(alone(run).folder / FINAL_LORA_WEIGHTS, lambda draft: bool(shutil.copyfile(stale, draft / ADAPTER)))
    assert broken(verify_run(run)) >= {LIVE}


def test_a_base_that_changed_under_the_run_is_found(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    run = train_run(tmp_path, own)
    shutil.copyfile(save_model(tmp_path / "other", seed=7) / "model.safetensors", own / "model.safetensors")
    found = verify_run(run)
    assert broken(found) == {BASE}
    assert "model.safetensors" in found.broken[0].found


@pytest.mark.parametrize("content", [None, b"nothing"])
def test_without_its_probe_a_run_has_no_valid_certificate(content: bytes | None, run: Run) -> None:
    (run.folder / PROBE).unlink()
    if content:
        (run.folder / PROBE).write_bytes(content)
    assert broken(verify_run(alone(run))) == {"the live model left its probe"}


# -- full, QLoRA, stacked --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_trained_in_full_is_certified_and_a_broken_one_is_not(base: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, base, {"method": {}, "method.kind": "full", "optim.learning_rate": 1e-2})
    certificate = verify_run(run)
    assert certificate.broken == []
    assert certificate.artefact == FINAL_MODEL
    with pytest.raises(CallError, match="a whole model already"):
        merge_run(run, None, MergeOptions())
    good = Path(shutil.copytree(run.folder, tmp_path / "kept"))
    back = read_tensors(base)
    for fault, wanted in (
        (with_tensors(lambda found: found.update({SQUARE: found[SQUARE].T})), {LIVE}),
        (with_tensors(lambda found: found.update(back)), {LIVE, MOVED}),
        (with_tensors(lambda found: found[SQUARE].view(-1)[:1].fill_(float("nan"))), {FINITE, LIVE}),
        (with_json("generation_config.json", lambda table: table.update(eos_token_id=7)), {STOPS}),
    ):
        shutil.rmtree(run.folder)
        shutil.copytree(good, run.folder)
        change(run.folder / FINAL_MODEL, fault)
        assert wanted <= broken(verify_run(run))


@pytest.mark.parametrize("nf4", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_qlora_run_merges_onto_either_base_and_says_which(nf4: bool, base: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, base, {"method.kind": "qlora", "compute.precision": "bf16"})
    verify_run(run)
    certificate = merge_run(run, None, MergeOptions(nf4=nf4)).certificate
    assert certificate is not None
    assert certificate.broken == []
    live = next(each for each in certificate.of(MERGED_MODEL).claims if each.claim.startswith("it says what the live"))
    assert ("stated" in live.allowed) is not nf4
    assert certificate.facts["nf4"] is nf4
    # Without being told, a later look finds the same: the manifest says onto what it was merged.
    again = verify_run(run)
    assert again.broken == []
    assert again.facts["nf4"] is nf4


@pytest.mark.slow
@pytest.mark.parametrize("nf4", [False, True])
def test_a_run_over_a_run_is_merged_in_order(nf4: bool, base: Path, tmp_path: Path) -> None:
    qlora = {"method.kind": "qlora", "compute.precision": "bf16"}
    first = train_run(tmp_path / "one", base, qlora)
    second = train_run(tmp_path / "two", first.folder, {**qlora, "seed": 2})
    assert verify_run(second).broken == []
    merged = merge_run(second, tmp_path / "out", MergeOptions(nf4=nf4))
    assert merged.certificate is not None
    assert merged.certificate.broken == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "one", "out", "two"]


def test_nf4_is_of_qlora_alone(run: Run) -> None:
    verify_run(alone(run))
    with pytest.raises(CallError, match="not trained over 4-bit values"):
        merge_run(run, None, MergeOptions(nf4=True))


# -- merging ---------------------------------------------------------------------------------------------------------


def test_a_merge_is_refused_without_a_certificate_and_goes_on_when_told(run: Run, tmp_path: Path) -> None:
    alone(run)
    with pytest.raises(ProofError, match="no certificate") as refused:
        merge_run(run, None, MergeOptions())
    assert "luthier verify" in refused.value.hint
    merged = merge_run(run, tmp_path / "out", MergeOptions(certified=None))
    assert merged.certificate is None
    assert [each["what"] for each in run.lineage["without_certificate"]] == [f"merge: {tmp_path / 'out'}"]


def test_a_merged_model_elsewhere_has_its_certificate_in_it(run: Run, tmp_path: Path) -> None:
    verify_run(alone(run))
    before = (run.folder / CERTIFICATE).read_bytes()
    merge_run(run, tmp_path / "out", MergeOptions())
    assert (run.folder / CERTIFICATE).read_bytes() == before
    found = json.loads((tmp_path / "out" / CERTIFICATE).read_bytes())
    assert found["valid"] is True
    assert found["run"] == run.id
    files = check_manifest(tmp_path / "out")["files"]
    assert {name: entry["sha256"] for name, entry in files.items() if name != CERTIFICATE} == found["files"]
    check_certificate(run)


def test_a_broken_merge_never_appears(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_run(alone(run))
    add = merge._Change.add_to
    monkeypatch.setattr(merge._Change, "add_to", lambda self, values, part: 2 * add(self, values, part) - values)
    with pytest.raises(ProofError, match=r"the merged model is not base \+ adapter") as refused:
        merge_run(run, None, MergeOptions())
    assert {SUMS, LOGITS} <= {each["claim"] for each in refused.value.details["claims"] if not each["holds"]}  # type: ignore[index]
    assert not list(run.folder.glob(f"{MERGED_MODEL}*"))
    check_certificate(run)  # of the adapter, which is whole


@pytest.mark.slow
def test_the_template_of_the_run_goes_along(base: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    run = train_run(tmp_path, base, {"model.chat_template": str(template)})
    verify_run(run)
    merged = merge_run(run, None, MergeOptions())
    assert (merged.folder / "chat_template.jinja").read_text() == template.read_text()
    change(merged.folder, lambda draft: (draft / "chat_template.jinja").unlink())
    assert broken(verify_run(run)) == {TEXT}


def test_asked_to_stop_nothing_is_left(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_run(alone(run))
    asked = []

    def stop_in_the_certificate(order: Order, should_stop: Callable[[], bool] | None) -> Certificate:
        asked.append(order)
        raise Stopped

    monkeypatch.setattr(verify, "certify_in_fresh_process", stop_in_the_certificate)
    with pytest.raises(Stopped):
        merge_run(run, None, MergeOptions())
    assert len(asked) == 1
    assert not list(run.folder.glob(f"{MERGED_MODEL}*"))


# -- the certificate itself ------------------------------------------------------------------------------------------


def test_a_certificate_speaks_only_of_the_files_it_was_made_of(run: Run) -> None:
    verify_run(run)
    weights = run.folder / MERGED_MODEL / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ProofError, match=r"merged_model/model\.safetensors` .* has changed"):
        check_certificate(run)
    weights.write_bytes(good)
    check_certificate(run)
    (run.folder / MERGED_MODEL / "more.json").write_text("{}")
    with pytest.raises(ProofError, match=r"does not speak of `merged_model/more\.json`"):
        check_certificate(run)
    shutil.rmtree(run.folder / MERGED_MODEL)
    with pytest.raises(ProofError, match="what is gone"):
        check_certificate(run)


def test_a_merged_model_that_came_later_is_not_certified(run: Run, base: Path) -> None:
    verify_run(alone(run))
    merge_plainly(run, base)
    with pytest.raises(ProofError, match="does not speak of"):
        check_certificate(run)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table["claims"][0].update(holds=False),
        lambda table: table.update(valid=False),
        lambda table: table.update(claims=[]),
        lambda table: table.pop("files"),
        lambda table: table["claims"][0].pop("holds"),
    ],
)
def test_a_certificate_that_contradicts_itself_is_none(spoil: Callable[[Any], Any], run: Run) -> None:
    verify_run(alone(run))
    table = json.loads((run.folder / CERTIFICATE).read_bytes())
    spoil(table)
    (run.folder / CERTIFICATE).write_text(json.dumps(table))
    with pytest.raises(ProofError, match="cannot be read"):
        check_certificate(run)


@pytest.mark.slow
def test_prompts_of_a_person_s_own_are_asked_too(run: Run, tmp_path: Path) -> None:
    count = verify_run(run).facts["prompts"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n"plain words"\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    certificate = verify_run(run, prompts=prompts)
    assert certificate.broken == []
    assert certificate.facts["prompts"] == count + 3
    prompts.write_text('{"question": 1}')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: expected a text, a list"):
        verify_run(run, prompts=prompts)


def test_a_run_that_is_not_done_cannot_be_certified(run: Run) -> None:
    shutil.rmtree(run.folder / FINAL_LORA_WEIGHTS)
    with pytest.raises(RunError, match="no final weights yet"):
        verify_run(run)


# -- the process and the commands ------------------------------------------------------------------------------------


@pytest.fixture
def really(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are started."""
    monkeypatch.setattr(verify, "certify_in_fresh_process", fresh.certify_in_fresh_process)


@pytest.mark.usefixtures("really")
def test_a_fresh_process_finds_the_same(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    change(run.folder / MERGED_MODEL, with_tensors(lambda found: found[SQUARE].zero_()))
    assert main(["verify", str(run.folder)]) == 1
    out = capsys.readouterr().out
    assert f"  FAILS  {SUMS}" in out
    assert "certificate NOT VALID" in out
    there = find_certificate(run)
    assert there is not None
    here = fresh.gather_claims(Order(str(run.folder), str(run.folder / MERGED_MODEL)))
    assert [(each.claim, each.holds) for each in here.claims] == [(each.claim, each.holds) for each in there.claims]
    assert here.files == there.files


@pytest.mark.slow
@pytest.mark.usefixtures("really")
def test_a_process_that_is_stopped_or_fails_is_told(base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base, tmp_path / "base"))
    run = train_run(tmp_path, base)
    with pytest.raises(Stopped):
        verify_run(run, should_stop=lambda: True)
    assert not (run.folder / CERTIFICATE).exists()
    with pytest.raises(ProofError, match="the certificate could not be made: its process ended with 1: AssertionError"):
        fresh.certify_in_fresh_process(Order(str(run.folder.parent)))
    shutil.rmtree(base)
    with pytest.raises(ProofError, match=r"the certificate could not be made: no model at .*base"):
        verify_run(run)
    assert not (run.folder / CERTIFICATE).exists()


@pytest.mark.slow
def test_the_commands(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone(run)
    assert main(["merge", str(run.folder)]) == 1
    assert "luthier verify" in capsys.readouterr().err
    assert main(["verify", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == FINAL_LORA_WEIGHTS
    assert "certificate valid: final_lora_weights is what was trained, all 10 claims hold" in out
    assert main(["merge", str(run.folder)]) == 0
    assert f"merged: {run.folder / MERGED_MODEL} (" in capsys.readouterr().out
    assert main(["merge", str(run.folder)]) == 2
    capsys.readouterr()
    assert main(["merge", str(run.folder), "-o", str(tmp_path / "wide"), "--dtype", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["certificate"]["valid"] is True
    assert found["changed_share"] > 0.9
    assert main(["verify", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artefact"] == MERGED_MODEL
    bare = ["merge", str(run.folder), "-o", str(tmp_path / "bare"), "--without-certificate"]
    assert main(bare) == 0
    assert "warning: no certificate" in capsys.readouterr().err
    assert not (tmp_path / "bare" / CERTIFICATE).exists()
