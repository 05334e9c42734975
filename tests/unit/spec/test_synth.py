"""A Synth job loads unchanged, each key of it understood, noted or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import SpecError
from luthier.spec.load import LoadedSpec, Override, load_spec, load_spec_text
from luthier.spec.method import QloraMethod

SEED = Path(__file__).parents[2] / "data" / "synth_seed_001.toml"
JOB = '[job]\nmodel = "Qwen/Qwen3-4B"\n'


def load(text: str) -> LoadedSpec:
    """The job as it lies in /jobs."""
    return load_spec_text(text, "toml", name="job.toml", base_dir=Path("/jobs"))


def refusal(text: str) -> SpecError:
    """The error of a job that cannot be understood."""
    with pytest.raises(SpecError) as caught:
        load(text)
    return caught.value


def test_the_seed_loads_unchanged() -> None:
    loaded = load_spec(SEED)
    spec = loaded.spec
    assert spec.model.base == "Qwen/Qwen3-4B"
    assert spec.method.kind == "qlora"
    assert (spec.optim.batch, spec.optim.micro_batch, spec.optim.epochs) == (64, 1, 1.0)
    assert (spec.optim.learning_rate, spec.optim.warmup_ratio) == (5e-6, 0.03)
    assert spec.data.max_length == 4096
    assert spec.data.valid == 0.05
    assert (spec.evaluate.every_steps, spec.evaluate.keep, spec.evaluate.best_metric) == (20, "best", "loss")
    assert (spec.compute.gpu_type, spec.compute.gpu_count, spec.compute.nodes) == ("H100", 1, 1)
    assert spec.objective.kind == "sft"


def test_the_seed_says_what_changes_nothing() -> None:
    notes = load_spec(SEED).notes
    assert len(notes) == 3
    assert any("greater_is_better" in note for note in notes)
    assert any("training.mode" in note for note in notes)
    assert any("evaluation_strategy" in note for note in notes)


def test_each_value_comes_from_the_line_of_their_key() -> None:
    lines = SEED.read_text("utf-8").splitlines()
    origins = load_spec(SEED).origins
    for ours, theirs in {
        "model.base": "model =",
        "method.kind": "use_qlora",
        "optim.batch": "gradient_accumulation_steps",
        "optim.micro_batch": "per_device_batch",
        "data.max_length": "sequence_length",
        "evaluate.every_steps": "eval_steps",
    }.items():
        name, _, number = origins[ours].rpartition(":")
        assert name == "synth_seed_001.toml"
        assert lines[int(number) - 1].startswith(theirs)


def test_flags_lie_over_a_job() -> None:
    loaded = load_spec(SEED, [Override("data.train", "rows.jsonl", "flag --data")])
    assert loaded.spec.data.train == "rows.jsonl"
    assert loaded.origins["data.train"] == "flag --data"


def test_paths_of_a_job_are_left_to_the_working_directory() -> None:
    spec = load(JOB + 'data = "train.jsonl"\n[data]\nvalidation_path = "held.jsonl"').spec
    assert spec.data.train == "train.jsonl"
    assert spec.data.valid == "held.jsonl"


def test_without_validation_nothing_is_held_out() -> None:
    assert load(JOB).spec.data.valid == 0
    assert load(JOB + "[training.validation]\nenabled = false").spec.data.valid == 0
    assert load(JOB + "[training.validation]\nenabled = true").spec.data.valid == 0.05


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "full"),
        ('[hyperparameters]\ntrain_kind = "fft"', "full"),
        ('[hyperparameters]\ntrain_kind = "peft"\nlora_rank = 8', "lora"),
        ('[algorithm]\nvariety = "fft"', "full"),
        ('[algorithm]\nvariety = "qlora"', "qlora"),
        ("[training]\nuse_qlora = true", "qlora"),
        ("[training]\nuse_qlora = false", "full"),
        ("[training]\nuse_qlora = true\nlora = { rank = 8 }", "qlora"),
    ],
)
def test_how_the_method_is_told(text: str, kind: str) -> None:
    method = load(f"{JOB}{text}\n").spec.method
    assert method.kind == kind
    if "rank" in text:
        assert getattr(method, "rank", None) == 8


@pytest.mark.parametrize("table", ["lora", "training.lora"])
def test_the_table_of_an_adapter(table: str) -> None:
    text = f"{JOB}[training]\nuse_qlora = true\n[{table}]\nr = 8\nalpha = 24\ndropout = 0.1\n"
    method = load(f'{text}target_modules = ["all-linear"]\nmodules_to_save = ["lm_head"]\n').spec.method
    assert isinstance(method, QloraMethod)
    assert (method.rank, method.alpha, method.dropout) == (8, 24, 0.1)
    assert (method.targets, method.also_train) == ("auto", ["lm_head"])
    named = load(f'{text}target_modules = ["q_proj", "v_proj"]\n').spec.method
    assert getattr(named, "targets", None) == ["q_proj", "v_proj"]


def test_an_adapter_of_a_full_run_is_an_error() -> None:
    assert "alpha" in str(refusal(f"{JOB}[lora]\nalpha = 24\n"))


def test_qlora_wins_over_the_kind_of_training_with_a_note() -> None:
    loaded = load(JOB + '[training]\nuse_qlora = true\n[hyperparameters]\ntrain_kind = "fft"')
    assert loaded.spec.method.kind == "qlora"
    assert any("`training.use_qlora` decides the method" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("text", "batch", "micro"),
    [
        ("per_device_batch = 2\ngradient_accumulation_steps = 8", 16, 2),
        ("per_device_batch = 2", 2, 2),
        ("gradient_accumulation_steps = 8", 8, None),
        ("batch_size = 12", 12, None),
        ("global_batch = 12\nper_device_batch = 3", 12, 3),
        ("", 16, None),
    ],
)
def test_how_the_batch_is_told(text: str, batch: int, micro: int | None) -> None:
    optim = load(f"{JOB}[hyperparameters]\n{text}\n").spec.optim
    assert (optim.batch, optim.micro_batch) == (batch, micro)


def test_the_model_may_stand_in_its_own_table() -> None:
    loaded = load('[model]\nsource = "Qwen/Qwen3-4B"\n[hyperparameters]\nn_epochs = 2')
    assert loaded.spec.model.base == "Qwen/Qwen3-4B"
    assert loaded.spec.optim.epochs == 2.0


def test_parallelism_becomes_ours_and_what_is_not_known_is_noted() -> None:
    loaded = load(JOB + '[hyperparameters.parallelism]\nuse_deepspeed = true\nbf16 = true\nfsdp = "full"\nring = 2')
    given = loaded.spec.compute.parallelism
    assert (given.use_deepspeed, given.bf16, given.fsdp, given.fp16) == (True, True, "full", None)
    assert [note.split(" = ")[0] for note in loaded.notes] == ["`hyperparameters.parallelism.ring"]
    wrong = refusal(JOB + "[hyperparameters.parallelism]\ndeepspeed_stage = 7")
    assert "`compute.parallelism.deepspeed_stage`: expected at most 3, found 7" in wrong.message


def test_every_unknown_key_is_listed() -> None:
    error = refusal(JOB + 'tpyo = 1\n[training]\nmdoe = "x"\n[training.extra]\na = 1\n[hyperparameters]\nn_epoch = 1\n')
    assert error.exit_code == 2
    listed = error.message.partition("not understood: ")[2]
    assert listed == "`hyperparameters.n_epoch`, `job.tpyo`, `training.extra.a`, `training.mdoe`"


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        (JOB + '[hyperparameters]\nlearning_rate = "fast"', "optim.learning_rate", 4),
        (JOB + "[hyperparameters]\nsequence_length = 1.5", "data.max_length", 4),
        (JOB + '[hyperparameters]\ntrain_kind = "fft"\nlora_rank = 8', "method.rank", 5),
        (JOB + '[hyperparameters]\ntrain_kind = "magic"', "method.kind", 4),
        ("[job]\nmodel = 3", "model.base", 2),
    ],
)
def test_a_wrong_value_points_at_the_line_of_their_key(text: str, path: str, line: int) -> None:
    error = refusal(text)
    assert f"`{path}`" in error.message
    assert error.where == f"job.toml:{line}"


@pytest.mark.parametrize(
    ("text", "ours", "keys"),
    [
        ('[job]\nmodel = "a/one"\n[model]\nsource = "b/two"', "model.base", ("job.model", "model.source")),
        (JOB + 'data = "one.jsonl"\ndata_path = "two.jsonl"', "data.train", ("job.data", "job.data_path")),
        (
            JOB + '[hyperparameters]\ntrain_kind = "peft"\nlora_rank = 4\n[training.lora]\nrank = 8',
            "method.rank",
            ("hyperparameters.lora_rank", "training.lora.rank"),
        ),
    ],
    ids=["model", "data", "rank"],
)
def test_of_two_keys_for_one_thing_the_loser_is_noted(text: str, ours: str, keys: tuple[str, str]) -> None:
    loaded = load(text)
    lines = text.splitlines()
    winning_line = lines[int(loaded.origins[ours].rpartition(":")[2]) - 1]
    loser = keys[0] if winning_line.startswith(f"{keys[1].rpartition('.')[2]} =") else keys[1]
    assert [note for note in loaded.notes if note.startswith(f"`{loser} =")], loaded.notes


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[training]\nuse_qlora = "false"', "training.use_qlora"),
        ('[training.validation]\nenabled = "false"', "training.validation.enabled"),
    ],
)
def test_a_switch_given_as_text_is_refused(text: str, key: str) -> None:
    """Any text is true to Python, `"false"` too."""
    error = refusal(JOB + text)
    assert error.exit_code == 2
    assert key in error.message
