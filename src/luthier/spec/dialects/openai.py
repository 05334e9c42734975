"""OpenAI's request for a fine-tuning job, translated to a run spec; what is decided for the person is noted.

Two keys of ours may stand beside theirs (the SDK's `extra_body`): `training` holds tables of a run spec (`method`,
`objective`, `optim`, `data`, `evaluate`, `output`), and `compute` is the table of that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import SpecError, UnsupportedError
from luthier.spec.dialects.job_request import (
    JobRequest,
    plain_suffix,
    read_metadata,
    read_name,
    read_table,
    share_among_processes,
)
from luthier.spec.optim import DEFAULT_RATES, PAIRS_RATE_SHARE

AUTO = "auto"
METHOD = "qlora"
"""The method where none is named: an adapter, so that one base serves all models; 4 bits take the least memory."""

_KEYS = {
    "model",
    "training_file",
    "validation_file",
    "method",
    "hyperparameters",
    "seed",
    "suffix",
    "metadata",
    "integrations",
    "training",
    "compute",
}
_OBJECTIVES = {"supervised": "sft", "dpo": "dpo"}
_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
_TABLES = {"method", "objective", "optim", "data", "evaluate", "output"}
_FILES = {"data": ("train",), "output": ("dir", "model_id_file")}
# Three passes, but at least 100 and at most 25,000 examples seen: what OpenAI's own guide counts with.
_EPOCHS, _LEAST_SEEN, _MOST_SEEN, _MOST_EPOCHS = 3, 100, 25_000, 25
_ROWS_PER_EXAMPLE_OF_A_BATCH, _MOST_BATCH = 32, 16


def build_job(request: Mapping[str, Any], *, rows: int) -> JobRequest:
    """What a request asks for, with `rows` rows to train on; SpecError names the part that cannot be understood."""
    _check_keys(request)
    kind = _kind_of_method(request)
    given, notes = _hyperparameters(request, kind)
    tables = _training_tables(request)
    tables["model"] = {"base": read_name(request, "model")}
    tables["compute"] = read_table(request, "compute")
    tables.setdefault("method", {}).setdefault("kind", METHOD)
    tables.setdefault("objective", {}).setdefault("kind", _OBJECTIVES[kind])
    if (seed := request.get("seed")) is not None:
        tables["seed"] = seed
    _place_hyperparameters(tables, given, rows, notes)
    validation = read_name(request, "validation_file") if request.get("validation_file") else None
    _place_rhythm(tables, rows, validation)
    share_among_processes(tables)
    if request.get("integrations"):
        notes.append("`integrations` changes nothing: `luthier report` sends a run's figures to a tracker")
    return JobRequest(
        tables=tables,
        training_file=read_name(request, "training_file"),
        validation_file=validation,
        suffix=plain_suffix(request.get("suffix")),
        metadata=read_metadata(request.get("metadata")),
        notes=notes,
    )


def choose_epochs(rows: int) -> int:
    """The passes that `auto` means: three, more over few rows and fewer over many."""
    if rows * _EPOCHS < _LEAST_SEEN:
        return min(_MOST_EPOCHS, _LEAST_SEEN // max(1, rows))
    if rows * _EPOCHS > _MOST_SEEN:
        return max(1, _MOST_SEEN // rows)
    return _EPOCHS


def choose_batch(rows: int) -> int:
    """The size of a step that `auto` means: a power of two, at least 32 steps in a pass where rows allow it."""
    wanted = min(_MOST_BATCH, max(1, rows // _ROWS_PER_EXAMPLE_OF_A_BATCH))
    return 1 << (wanted.bit_length() - 1)


def default_rate(method: str, objective: str) -> float:
    """The learning rate that `learning_rate_multiplier` multiplies."""
    rate = DEFAULT_RATES.get(method, DEFAULT_RATES[METHOD])
    return rate * PAIRS_RATE_SHARE if objective in ("dpo", "simpo", "orpo") else rate


def _check_keys(request: Mapping[str, Any]) -> None:
    if unknown := sorted(set(request) - _KEYS):
        raise SpecError(
            f"unknown keys: {', '.join(f'`{key}`' for key in unknown)}",
            hint=f"known are {', '.join(sorted(_KEYS))}; tables of a run spec go under `training`",
            where=unknown[0],
        )


def _kind_of_method(request: Mapping[str, Any]) -> str:
    method = read_table(request, "method")
    kind = method.get("type", "supervised")
    if kind == "reinforcement":
        raise UnsupportedError(
            "method `reinforcement` is not offered by this server",
            hint="the methods are supervised and dpo",
            where="method.type",
        )
    if kind not in _OBJECTIVES:
        raise SpecError(f"`method.type` is {kind!r}; expected supervised or dpo", where="method.type")
    if unknown := sorted(set(method) - {"type", *_OBJECTIVES}):
        raise SpecError(f"unknown key `method.{unknown[0]}`", where=f"method.{unknown[0]}")
    return str(kind)


def _hyperparameters(request: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Those of the method; the deprecated ones at the top count where the method says nothing."""
    part = read_table(read_table(request, "method"), kind, "method.")
    where = f"method.{kind}.hyperparameters"
    of_method = read_table(part, "hyperparameters", f"method.{kind}.")
    old = read_table(request, "hyperparameters")
    known = {*_HYPERPARAMETERS, "beta"} if kind == "dpo" else set(_HYPERPARAMETERS)
    for table, name in ((of_method, where), (old, "hyperparameters")):
        if unknown := sorted(set(table) - known):
            raise SpecError(
                f"unknown key `{name}.{unknown[0]}`",
                hint=f"known are {', '.join(sorted(known))}",
                where=f"{name}.{unknown[0]}",
            )
    lost = [key for key in old if of_method.get(key) is not None and of_method[key] != old[key]]
    notes = [f"`hyperparameters.{key} = {old[key]}` changes nothing: `{where}` says it already" for key in lost]
    asked = {**old, **{key: value for key, value in of_method.items() if value is not None}}
    return {key: value for key, value in asked.items() if value not in (None, AUTO)}, notes


def _training_tables(request: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a run spec under `training`, without any that name a file or folder of the server."""
    training = read_table(request, "training")
    if isinstance(training.get("method"), str):
        training["method"] = {"kind": training["method"]}
    if isinstance(uses_qlora := training.pop("use_qlora", None), bool) and "method" not in training:
        training["method"] = {"kind": "qlora" if uses_qlora else "lora"}
    if unknown := sorted(set(training) - _TABLES):
        raise SpecError(
            f"unknown key `training.{unknown[0]}`",
            hint=f"the tables are {', '.join(sorted(_TABLES))}",
            where=f"training.{unknown[0]}",
        )
    tables = {name: read_table(training, name, "training.") for name in training}
    for name, keys in _FILES.items():
        for key in keys:
            if key in tables.get(name, {}):
                raise SpecError(f"`training.{name}.{key}` is decided by the server", where=f"training.{name}.{key}")
    if isinstance(tables.get("data", {}).get("valid"), str):
        raise SpecError(
            "`training.data.valid`: expected a share or a count",
            hint="a file goes into `validation_file`",
            where="training.data.valid",
        )
    return tables


def _place_hyperparameters(tables: dict[str, Any], given: dict[str, Any], rows: int, notes: list[str]) -> None:
    optim = tables.setdefault("optim", {})
    method, objective = tables["method"]["kind"], tables["objective"]["kind"]
    if (multiplier := given.get("learning_rate_multiplier")) is not None:
        rate = default_rate(str(method), str(objective))
        _place(tables, "optim.learning_rate", rate * _number(multiplier, "learning_rate_multiplier"))
        notes.append(f"`learning_rate_multiplier` {multiplier} x {rate:g} = {optim['learning_rate']:g}")
    if (epochs := given.get("n_epochs")) is not None:
        _place(tables, "optim.epochs", _number(epochs, "n_epochs"))
    elif not {"epochs", "steps"} & set(optim):
        optim["epochs"] = float(choose_epochs(rows))
        notes.append(f"`n_epochs` is {choose_epochs(rows)} for {rows:,} rows")
    if (batch := given.get("batch_size")) is not None:
        _place(tables, "optim.batch", batch)
    elif "batch" not in optim:
        optim["batch"] = choose_batch(rows)
        notes.append(f"`batch_size` is {choose_batch(rows)} for {rows:,} rows")
    if (beta := given.get("beta")) is not None:
        _place(tables, "objective.beta", _number(beta, "beta"))


def _place(tables: dict[str, Any], path: str, value: Any) -> None:
    name, key = path.split(".")
    if key in tables[name]:
        raise SpecError(
            f"`training.{path}` is given beside the hyperparameter that sets it; keep one of them",
            where=f"training.{path}",
        )
    tables[name][key] = value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f'`{key}`: expected "auto" or a number, found {value!r}', where=key)
    return float(value)


def _place_rhythm(tables: dict[str, Any], rows: int, validation: str | None) -> None:
    """A checkpoint after each pass, and the validation file measured with it."""
    data, evaluate, output = (tables.setdefault(name, {}) for name in ("data", "evaluate", "output"))
    batch = tables["optim"]["batch"]
    steps = max(1, -(-rows // batch)) if isinstance(batch, int) and batch > 0 else 1
    if validation is None:
        data.setdefault("valid", 0)
    elif "valid" in data:
        raise SpecError("`training.data.valid` is given beside `validation_file`", where="training.data.valid")
    if validation is not None or data["valid"]:
        evaluate.setdefault("every_steps", steps)
    output.setdefault("save_every_steps", steps)
