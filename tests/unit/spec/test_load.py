"""Specs are loaded strictly, every problem is told at once with its place, and nothing is lost on the way to TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from hypothesis import assume, example, given

from luthier.errors import CallError, LuthierError, MissingPathError, SpecError
from luthier.spec.load import (
    MAX_SPEC_BYTES,
    PATH_KEYS,
    LoadedSpec,
    Override,
    dump_spec,
    load_spec,
    load_spec_text,
    parse_setting,
    render_toml,
    walk_values,
)
from luthier.spec.run import RunSpec, find_contradictions
from tests.golden.compare import check_golden
from tests.unit.spec.specs import spec_tables

MODEL = '[model]\nbase = "practice"\n'


def load(text: str, kind: str = "toml", overrides: list[Override] | None = None) -> LoadedSpec:
    """The text as a spec that lies in /specs."""
    return load_spec_text(text, kind, name=f"run.{kind}", base_dir=Path("/specs"), overrides=overrides)


def refusal(text: str, kind: str = "toml", *settings: str) -> SpecError:
    """The error of a spec that does not hold."""
    with pytest.raises(SpecError) as caught:
        load(text, kind, [parse_setting(each) for each in settings])
    return caught.value


# -- to TOML and back


@given(spec_tables())
def test_spec_to_toml_and_back(tables: dict[str, Any]) -> None:
    spec = RunSpec.model_validate(tables)
    text = render_toml(dump_spec(spec))
    assert RunSpec.model_validate(tomllib.loads(text)) == spec


@given(spec_tables())
@example({"model": {}, "engine": {"kind": "tinker"}, "method": {"kind": "lora"}})
def test_spec_is_the_same_in_every_language(tables: dict[str, Any]) -> None:
    for dotted in PATH_KEYS[1:]:
        table, key = dotted.split(".")
        tables.get(table, {}).pop(key, None)
    tables["model"]["base"] = "practice"
    spec = RunSpec.model_validate(tables)
    assume(not find_contradictions(spec))
    written = dump_spec(spec)
    assert load(render_toml(written)).spec == spec
    assert load(orjson.dumps(written).decode(), "json").spec == spec
    assert load(yaml.safe_dump(written, allow_unicode=True), "yaml").spec == spec


def test_the_smallest_spec_is_all_defaults() -> None:
    loaded = load(MODEL)
    assert loaded.spec == RunSpec.model_validate({"model": {"base": "practice"}})
    assert loaded.spec.method.kind == "auto"
    assert loaded.origins["model.base"] == "run.toml:2"
    assert set(loaded.origins.values()) == {"run.toml:2", "default"}
    assert loaded.origins.keys() == {path for path, _ in walk_values(dump_spec(loaded.spec))}


def test_a_table_without_its_kind_means_the_default_one() -> None:
    assert (
        load(MODEL + "[method]\nrank = 4").spec.method == load(MODEL + '[method]\nkind = "auto"\nrank = 4').spec.method
    )


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "2.0e-4", "2.e-4", "0.0002", "+2e-4"])
def test_yaml_numbers_are_what_they_look_like(number: str) -> None:
    loaded = load(f"model:\n  base: practice\noptim:\n  learning_rate: {number}\n", "yaml")
    assert loaded.spec.optim.learning_rate == 2e-4
    assert loaded.origins["optim.learning_rate"] == "run.yaml:4"


def test_json_is_a_spec_too() -> None:
    assert load('{"model": {"base": "practice"}, "seed": 3}', "json").spec.seed == 3


# -- problems


def test_every_problem_is_told_at_once_with_its_line() -> None:
    error = refusal(
        'seeed = 1\n[model]\nbase = 3\n\n[method]\nkind = "lora"\nrnak = 8\n[optim]\nbatch = 0\nepochs = "2"\n'
    )
    assert isinstance(error.details, list)
    told = {each["path"]: each["where"] for each in error.details}
    assert told == {
        "seeed": "run.toml:1",
        "model.base": "run.toml:3",
        "method.rnak": "run.toml:7",
        "optim.batch": "run.toml:9",
        "optim.epochs": "run.toml:10",
    }
    assert all(f"{where}: " in error.message for where in told.values())
    assert error.message.startswith("5 problems in run.toml")


@pytest.mark.parametrize(
    ("table", "key", "nearest"),
    [
        ("method", "rnak", "rank"),
        ("optim", "learning-rate", "learning_rate"),
        ("optim", "learningrate", "learning_rate"),
        ("optim", "lr", ""),
        ("optim", "max_length", "data.max_length"),
        ("data", "learning_rate", "optim.learning_rate"),
        ("data", "dataset", ""),
        ("output", "directory", "dir"),
    ],
)
def test_unknown_key_and_the_nearest_known(table: str, key: str, nearest: str) -> None:
    error = refusal(f"{MODEL}[{table}]\n{key} = 1\n")
    assert error.message == f"unknown key `{table}.{key}` in run.toml:4"
    assert error.hint == f"did you mean `{nearest}`?" if nearest else "known keys: " in error.hint


def test_unknown_table_and_the_nearest_known() -> None:
    assert refusal(MODEL + "[optimizer]\nbatch = 1").hint == "did you mean `optim`?"


@pytest.mark.parametrize("kind", ["lora", "qlora", "auto"])
def test_the_tag_of_a_union_is_no_part_of_a_path(kind: str) -> None:
    error = refusal(f'{MODEL}[method]\nkind = "{kind}"\nrank = "8"\nfull = 1\n')
    assert [each["path"] for each in error.details] == ["method.rank", "method.full"]  # type: ignore[attr-defined]


def test_a_key_of_another_kind_is_unknown() -> None:
    error = refusal(MODEL + '[method]\nkind = "full"\nrank = 8\n')
    assert error.message == 'unknown key `method.rank` (kind = "full") in run.toml:5'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('method = "lora"\n' + MODEL, "`method`: expected a table, found 'lora'"),
        (MODEL + "[compute]\nprocesses = 1.5", "expected a whole number, found 1.5"),
        (MODEL + "[data]\nunroll = 1", "expected true or false, found 1"),
        (MODEL + "[data]\nvalid = 1.0", "expected less than 1.0 or a whole number or text, found 1.0"),
        (MODEL + "[method]\ntargets = 3", 'expected one of "auto" or a list, found 3'),
        (MODEL + "[optim]\nlearning_rate = inf", "expected a finite number, found inf"),
        (MODEL + "[optim]\nlearning_rate = nan", "expected a finite number, found nan"),
        (MODEL + "[optim]\nepochs = inf", "expected a finite number, found inf"),
        (MODEL + "[optim]\nbatch = true", "expected a whole number, found True"),
        ("[model]\nbase = ''", "expected text that is not empty, found ''"),
        (f"seed = {2**63}\n{MODEL}", "`seed` is larger than 64 bits hold"),
        ("seed = 1", "`model.base` is missing"),
        ("", "`model.base` is missing"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_found(text: str, words: str) -> None:
    assert words in refusal(text).message


def test_a_long_value_is_not_repeated_whole() -> None:
    assert len(refusal(f'{MODEL}[optim]\nkind = "{"x" * 100_000}"').message) < 400


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("[model]\nbase = practice", "toml", "not valid TOML: Invalid value"),
        ("seed = 1\nseed = 2", "toml", "not valid TOML: Cannot overwrite"),
        ("[model]\n[model]", "toml", "not valid TOML: Cannot declare"),
        ("a = " + "[" * 3000, "toml", "nested too deeply"),
        ("model: {base: [}", "yaml", "not valid YAML"),
        ("seed: 1\nseed: 2", "yaml", "the key `seed` stands twice"),
        ("a: &a {b: 1}\nc: *a", "yaml", "line 2: aliases are not taken"),
        ("a: &a\n  b: *a", "yaml", "aliases are not taken"),
        ("a: " + "[" * 1000, "yaml", "nested too deeply"),
        ("model: !!python/name:os.system", "yaml", "not valid YAML: could not determine a constructor"),
        ("- 1", "yaml", "expected tables at the top, found a list"),
        ("", "yaml", "expected tables at the top, found nothing"),
        ('{"seed": 1, "seed": 2}', "json", "the key `seed` stands twice"),
        ('{"seed": NaN}', "json", "not valid JSON"),
        ("[1]", "json", "expected tables at the top, found a list"),
    ],
)
def test_a_text_that_cannot_be_read_says_why(text: str, kind: str, words: str) -> None:
    error = refusal(text, kind)
    assert error.message.startswith(f"run.{kind}: ")
    assert words in error.message


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[optim]\nwarmup_ratio = 0.1\nwarmup_steps = 5", "optim.warmup_steps"),
        ('[evaluate]\nkeep = "best"', "evaluate.keep"),
        ("[evaluate]\nearly_stop_patience = 3", "evaluate.early_stop_patience"),
        ("[data]\nvalid = 0\n[evaluate]\nevery_steps = 5", "evaluate.every_steps"),
        ('[objective]\nkind = "pretrain"\n[data]\nunroll = true', "data.unroll"),
        ('[data]\ntoo_long = "split"', "data.too_long"),
        ('[engine]\nkind = "tinker"\n[method]\nkind = "qlora"', "method.kind"),
        ('[engine]\nkind = "trl"\n[objective]\nkind = "simpo"', "objective.kind"),
        ('[engine]\nkind = "trl"\n[objective]\nkind = "dpo"\nlabel_smoothing = 0.1', "objective.label_smoothing"),
        ('[engine]\nkind = "trl"\n[compute]\nprecision = "fp16"', "compute.precision"),
        ('[engine]\nkind = "trl"\n[compute.parallelism]\nfp16 = true', "compute.parallelism.fp16"),
        ("[compute.parallelism]\nbf16 = true\nfp16 = true", "compute.parallelism.fp16"),
        ('[compute]\nprecision = "fp32"\nparallelism = { bf16 = true }', "compute.parallelism.bf16"),
        (
            '[compute]\nrecompute = "never"\n[compute.parallelism]\nactivation_checkpointing = true',
            "compute.parallelism.activation_checkpointing",
        ),
        ('[engine]\nkind = "mlx"\n[compute]\nprocesses = 2', "compute.processes"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, path: str) -> None:
    error = refusal(f"{MODEL}{text}\n")
    assert error.message.startswith(f"`{path}` ")
    assert error.where.startswith("run.toml:")


# -- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.learning_rate=2e-4", 2e-4),
        ("optim.learning_rate = 2e-4 ", 2e-4),
        ("data.valid=500", 500),
        ("data.valid=held out.jsonl", "held out.jsonl"),
        ("optim.schedule=linear", "linear"),
        ('optim.schedule="linear"', "linear"),
        ("method.rslora=true", True),
        ('method.also_train=["lm_head"]', ["lm_head"]),
        ("about.title=a=b", "a=b"),
        ("about.title=", ""),
        ("seed=3", 3),
    ],
)
def test_set_reads_values_as_toml_and_else_as_text(text: str, value: object) -> None:
    override = parse_setting(text)
    assert override.value == value
    assert type(override.value) is type(value)
    assert override.origin == f"--set {text.partition('=')[0].strip()}"


@pytest.mark.parametrize("text", ["", "seed", "=3", "a b=3", "optim..batch=3", ".seed=3", "seed.=3"])
def test_set_without_key_or_value_is_a_wrong_call(text: str) -> None:
    with pytest.raises(CallError, match=r"expected section\.key=value") as caught:
        parse_setting(text)
    assert caught.value.exit_code == 2


def test_later_overrides_win_and_are_named_as_origin() -> None:
    overrides = [Override("optim.batch", 4, "flag --batch"), parse_setting("optim.batch=8"), parse_setting("seed=1")]
    loaded = load(MODEL + "[optim]\nbatch = 2\nepochs = 3.0", overrides=overrides)
    assert loaded.spec.optim.batch == 8
    assert loaded.origins["optim.batch"] == "--set optim.batch"
    assert loaded.origins["optim.epochs"] == "run.toml:5"
    assert loaded.origins["seed"] == "--set seed"
    assert loaded.origins["optim.kind"] == "default"


def test_a_bad_override_is_told_with_the_words_that_gave_it() -> None:
    error = refusal(MODEL, "toml", "method.rnak=8", "optim.batch=many")
    assert isinstance(error.details, list)
    assert [each["where"] for each in error.details] == ["--set method.rnak", "--set optim.batch"]


def test_an_override_below_a_value_is_a_wrong_call() -> None:
    with pytest.raises(CallError, match=r"`seed` is a value, not a table"):
        load("seed = 1\n" + MODEL, overrides=[parse_setting("seed.x=1")])


def test_flags_alone_make_a_spec() -> None:
    loaded = load_spec(None, [Override("model.base", "practice", "flag --model")])
    assert loaded.spec.model.base == "practice"
    assert loaded.name == "the command line"
    with pytest.raises(SpecError, match=r"`model\.base` is missing in the command line"):
        load_spec(None)


# -- paths


def test_paths_in_a_file_are_relative_to_it_and_those_of_flags_to_the_call(tmp_path: Path) -> None:
    folder = tmp_path / "specs"
    (folder / "base").mkdir(parents=True)
    spec = folder / "run.toml"
    spec.write_text(
        '[model]\nbase = "base"\nchat_template = "chat.jinja"\n[data]\ntrain = "../rows.jsonl"\nvalid = "held.jsonl"\n'
        '[output]\ndir = "out"\nmodel_id_file = "/abs/id.txt"\n'
    )
    loaded = load_spec(spec).spec
    assert loaded.model.base == str(folder / "base")
    assert loaded.model.chat_template == str(folder / "chat.jinja")
    assert loaded.data.train == str(tmp_path / "rows.jsonl")
    assert loaded.data.valid == str(folder / "held.jsonl")
    assert loaded.output.dir == str(folder / "out")
    assert loaded.output.model_id_file == "/abs/id.txt"
    flagged = load_spec(spec, [Override("data.train", "rows.jsonl", "flag --data")]).spec
    assert flagged.data.train == "rows.jsonl"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train", "-"),
        ("data.train", "hf:org/name:train"),
        ("data.valid", "hf:org/name:test"),
        ("model.base", "Qwen/Qwen3-0.6B"),
        ("model.base", "practice"),
        ("model.base", "ft:abc"),
    ],
)
def test_what_is_no_path_is_left_alone(key: str, value: str) -> None:
    tables: dict[str, Any] = {"model": {"base": "practice"}}
    table, name = key.split(".")
    tables.setdefault(table, {})[name] = value
    assert dump_spec(load(render_toml(tables)).spec)[table][name] == value


@pytest.mark.parametrize("path", ["~nobody-of-this-name/rows.jsonl", "a\\u0000b"])
def test_a_path_that_cannot_be_one_is_a_problem_of_the_spec(path: str) -> None:
    error = refusal(f'{MODEL}[data]\ntrain = "{path}"\n')
    assert "is no path" in error.message
    assert error.where == "run.toml:4"


def test_home_is_expanded(own_home: Path) -> None:
    assert load(MODEL + '[data]\ntrain = "~/rows.jsonl"').spec.data.train == str(own_home / "rows.jsonl")


# -- files


def test_a_spec_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="no spec at"):
        load_spec(tmp_path / "run.toml")
    with pytest.raises(MissingPathError, match="no spec at"):
        load_spec(tmp_path.with_suffix(".toml"))


@pytest.mark.parametrize("name", ["run.txt", "run", "run.toml.bak"])
def test_a_spec_file_of_another_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(MODEL)
    with pytest.raises(SpecError, match="not a run spec: found the ending"):
        load_spec(tmp_path / name)


def test_a_spec_file_that_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(MODEL + "#" * MAX_SPEC_BYTES)
    with pytest.raises(SpecError, match="the most is"):
        load_spec(tmp_path / "run.toml")


def test_a_spec_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(SpecError, match="not UTF-8 text: invalid start byte at byte 5"):
        load_spec(tmp_path / "run.toml")


def test_a_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + MODEL.replace("\n", "\r\n").encode() + b"rank = 1\r\n")
    with pytest.raises(SpecError, match=r"unknown key `model.rank` in run.toml:3"):
        load_spec(tmp_path / "run.toml")


# -- the words themselves

MISTAKES = {
    "a misspelt key": '[model]\nbase = "practice"\n[method]\nkind = "lora"\nrnak = 8\n',
    "a hyphen": '[model]\nbase = "practice"\n[optim]\nlearning-rate = 2e-4\n',
    "a key in another table": '[model]\nbase = "practice"\n[optim]\nmax_length = 512\n',
    "a kind that does not exist": '[model]\nbase = "practice"\n[method]\nkind = "lroa"\n',
    "a key of another kind": '[model]\nbase = "practice"\n[method]\nkind = "full"\nrank = 8\n',
    "a choice that does not exist": '[model]\nbase = "practice"\n[data]\ntoo_long = "cut"\n',
    "text for a number": '[model]\nbase = "practice"\n[optim]\nlearning_rate = "2e-4"\n',
    "text without quotes": "[model]\nbase = practice\n",
    "no model": "[data]\nvalid = 0.1\n",
    "a contradiction": '[model]\nbase = "practice"\n[evaluate]\nkeep = "best"\n',
    "a share beyond one": '[model]\nbase = "practice"\n[data]\nvalid = 1.5\n',
    "several at once": (
        'sed = 1\n[model]\nbase = ""\n[method]\nkind = "qlora"\nalpha = 0.0\n[optim]\nbatch = 0\nlr = 1e-4\n'
    ),
}


def test_messages_of_typical_mistakes() -> None:
    shown = []
    for name, text in MISTAKES.items():
        with pytest.raises(LuthierError) as caught:
            load(text)
        shown.append(f"# {name}\n{text}---\nerror: {caught.value.message}\nhint: {caught.value.hint}\n")
    check_golden("spec_errors.txt", "\n".join(shown))
