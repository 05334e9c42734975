"""The Synth job TOML, translated to a run spec; a key that means nothing here becomes a note, never silence.

Its paths are relative to the working directory, as its users know them. What its clients send over the wire is
`synth_wire.py`, which brings a payload into the form translated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.errors import SpecError

_TABLES = {"algorithm", "job", "compute", "data", "training", "hyperparameters", "tags", "model"}
_KIND_OF_TRAINING = {
    "fft": "full",
    "full": "full",
    "peft": "lora",
    "lora": "lora",
    "qlora": "qlora",
    "sft": "full",
}
_ALL_LINEAR = "all-linear"
_METRICS = {
    "val.loss": "loss",
    "val_loss": "loss",
    "loss": "loss",
    "eval_loss": "loss",
    "val.perplexity": "perplexity",
}
_PARALLELISM = {
    "use_deepspeed",
    "deepspeed_stage",
    "fsdp",
    "bf16",
    "fp16",
    "activation_checkpointing",
    "tensor_parallel_size",
    "pipeline_parallel_size",
}
_NOTES = {
    "algorithm.type": "offline training is what Luthier does",
    "algorithm.method": "supervised fine-tuning is the objective",
    "training.mode": "the objective is sft",
    "data.topology": "a local run has one container; a server checks it",
    "training.validation.evaluation_strategy": "evaluation is by steps",
    "training.validation.greater_is_better": "the direction follows from the metric",
    "tags": "a local run has no tags",
}


@dataclass
class Translation:
    """The tables, the notes, and which key of theirs became which of ours."""

    tables: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    came_from: dict[str, str] = field(default_factory=dict)

    def put(self, ours: str, value: Any, theirs: str) -> None:
        """Set our key from theirs."""
        table, key = ours.split(".")
        self.tables.setdefault(table, {})[key] = value
        self.came_from[ours] = theirs

    def note_unused(self, theirs: str, value: Any, why: str) -> None:
        """Note a key of theirs that was given and changes nothing."""
        if value not in (None, {}):
            self.notes.append(f"`{theirs} = {value}` is understood and changes nothing: {why}")

    def place_lines(self, lines: dict[str, int]) -> dict[str, int]:
        """Lines by our keys instead of theirs."""
        return {ours: lines[theirs] for ours, theirs in self.came_from.items() if theirs in lines}


def is_synth(tables: dict[str, Any]) -> bool:
    """Whether the tables are a Synth job: it names its model in [job] or its settings in [hyperparameters]."""
    return "job" in tables or "hyperparameters" in tables


def build_tables(tables: dict[str, Any], name: str) -> Translation:
    """Translate a Synth job; raises SpecError that lists every key that cannot be understood."""
    job = _Reader(tables)
    done = Translation()
    _translate_job(job, done)
    _translate_method(job, done)
    _translate_hyperparameters(job, done)
    _translate_validation(job, done)
    for key in ("gpu_type", "gpu_count", "nodes"):
        job.move(done, f"compute.{key}", f"compute.{key}")
    _translate_parallelism(job, done)
    for key, why in _NOTES.items():
        done.note_unused(key, job.take(key), why)
    _refuse_leftovers(job, name)
    return done


class _Reader:
    """Takes keys out of nested tables and knows what was never taken."""

    def __init__(self, tables: dict[str, Any]) -> None:
        self._tables = {key: _copied(value) for key, value in tables.items()}

    def take(self, path: str) -> Any:
        *parents, last = path.split(".")
        table: Any = self._tables
        for parent in parents:
            table = table.get(parent) if isinstance(table, dict) else None
        return table.pop(last, None) if isinstance(table, dict) else None

    def take_table(self, path: str) -> dict[str, Any]:
        found = self.take(path)
        if found is not None and not isinstance(found, dict):
            raise SpecError(f"`{path}` must be a table, found {found!r}")
        return found or {}

    def move(self, done: Translation, theirs: str, ours: str) -> None:
        if (value := self.take(theirs)) is not None:
            done.put(ours, value, theirs)

    def move_first(self, done: Translation, theirs: tuple[str, ...], ours: str) -> None:
        """Move the first of several keys that mean the same; another that was given beside it is noted."""
        given = [(key, value) for key in theirs if (value := self.take(key)) is not None]
        for key, value in given[:1]:
            done.put(ours, value, key)
        for key, value in given[1:]:
            done.note_unused(key, value, f"`{given[0][0]}` says it already")

    def take_switch(self, path: str) -> bool:
        """A key that is true or false, and false when it is not there."""
        found = self.take(path)
        if found is not None and not isinstance(found, bool):
            raise SpecError(f"`{path}`: expected true or false, found {found!r}")
        return bool(found)

    def leftovers(self) -> list[str]:
        return sorted(_leaves(self._tables, ""))


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _leaves(table: dict[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in table.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, dict) else [path]
    return found


def _translate_job(job: _Reader, done: Translation) -> None:
    job.move_first(done, ("job.model", "model.source"), "model.base")
    job.move_first(done, ("job.data", "job.data_path"), "data.train")
    if (valid := job.take("data.validation_path")) is not None:
        done.put("data.valid", valid, "data.validation_path")


def _translate_method(job: _Reader, done: Translation) -> None:
    wants_qlora = job.take_switch("training.use_qlora")
    kind = job.take("hyperparameters.train_kind")
    variety = job.take("algorithm.variety")
    theirs = "training.use_qlora" if wants_qlora else "hyperparameters.train_kind" if kind else "algorithm.variety"
    chosen = "qlora" if wants_qlora else str(kind or variety or "fft")
    done.put("method.kind", _KIND_OF_TRAINING.get(chosen, chosen), theirs)
    for key, value in (("hyperparameters.train_kind", kind), ("algorithm.variety", variety)):
        if key != theirs:
            done.note_unused(key, value, f"`{theirs}` decides the method")


def _translate_hyperparameters(job: _Reader, done: Translation) -> None:
    names = {"learning_rate": "optim.learning_rate", "warmup_ratio": "optim.warmup_ratio"}
    names |= {"weight_decay": "optim.weight_decay", "sequence_length": "data.max_length"}
    for theirs, ours in names.items():
        job.move(done, f"hyperparameters.{theirs}", ours)
    if (epochs := job.take("hyperparameters.n_epochs")) is not None:
        done.put("optim.epochs", float(epochs) if isinstance(epochs, int) else epochs, "hyperparameters.n_epochs")
    given_steps = tuple(f"hyperparameters.{key}" for key in ("total_steps", "train_steps", "steps"))
    job.move_first(done, given_steps, "optim.steps")
    _translate_adapter(job, done)
    _translate_batch(job, done)


def _translate_adapter(job: _Reader, done: Translation) -> None:
    """The `[lora]` table, which may also stand in `[training]`."""
    names = {"alpha": "method.alpha", "dropout": "method.dropout", "modules_to_save": "method.also_train"}
    job.move_first(done, ("hyperparameters.lora_rank", *_in_lora("rank"), *_in_lora("r")), "method.rank")
    for theirs, ours in names.items():
        job.move_first(done, _in_lora(theirs), ours)
    job.move_first(done, _in_lora("target_modules"), "method.targets")
    if done.tables.get("method", {}).get("targets") in (_ALL_LINEAR, [_ALL_LINEAR]):
        done.tables["method"]["targets"] = "auto"


def _in_lora(key: str) -> tuple[str, str]:
    return f"training.lora.{key}", f"lora.{key}"


def _translate_batch(job: _Reader, done: Translation) -> None:
    """One step's examples: given whole, or as what one device takes at once times the accumulation."""
    whole = [(key, job.take(f"hyperparameters.{key}")) for key in ("global_batch", "batch_size")]
    micro = job.take("hyperparameters.per_device_batch")
    accumulation = job.take("hyperparameters.gradient_accumulation_steps")
    given = next(((key, value) for key, value in whole if value is not None), None)
    if micro is not None:
        done.put("optim.micro_batch", micro, "hyperparameters.per_device_batch")
    if given is not None:
        done.put("optim.batch", given[1], f"hyperparameters.{given[0]}")
        others = [(key, value) for key, value in whole if key != given[0]]
        for key, value in [*others, ("gradient_accumulation_steps", accumulation)]:
            done.note_unused(f"hyperparameters.{key}", value, f"`{given[0]}` decides the size of a step")
    elif micro is not None or accumulation is not None:
        counts = [1 if value is None else value for value in (micro, accumulation)]
        product = counts[0] * counts[1] if all(isinstance(count, int) for count in counts) else accumulation
        done.put("optim.batch", product, "hyperparameters.gradient_accumulation_steps")


def _translate_parallelism(job: _Reader, done: Translation) -> None:
    """Known names are ours too, and a plan decides what they do; of others nobody here knows what they mean."""
    given = job.take_table("hyperparameters.parallelism")
    known = {key: value for key, value in given.items() if key in _PARALLELISM}
    if known:
        done.tables.setdefault("compute", {})["parallelism"] = known
    for key, value in given.items():
        if key in known:
            done.came_from[f"compute.parallelism.{key}"] = f"hyperparameters.parallelism.{key}"
        else:
            done.note_unused(f"hyperparameters.parallelism.{key}", value, "it has no effect on one device")


def _translate_validation(job: _Reader, done: Translation) -> None:
    prefix = "training.validation."
    enabled = job.take_switch(prefix + "enabled")
    steps = job.take(prefix + "eval_steps")
    metric = job.take(prefix + "metric_for_best_model")
    keeps_best = job.take(prefix + "save_best_model_at_end")
    if not enabled:
        for key, value in (
            ("eval_steps", steps),
            ("metric_for_best_model", metric),
            ("save_best_model_at_end", keeps_best),
        ):
            done.note_unused(prefix + key, value, "validation is not enabled")
        if done.tables.get("data", {}).get("valid") is None:
            done.put("data.valid", 0, prefix + "enabled")
        return
    if steps:
        done.put("evaluate.every_steps", steps, prefix + "eval_steps")
        if keeps_best:
            done.put("evaluate.keep", "best", prefix + "save_best_model_at_end")
    if metric is not None:
        done.put("evaluate.best_metric", _METRICS.get(metric, metric), prefix + "metric_for_best_model")


def _refuse_leftovers(job: _Reader, name: str) -> None:
    if unknown := job.leftovers():
        listed = ", ".join(f"`{key}`" for key in unknown)
        raise SpecError(
            f"{name}: keys of this Synth job are not understood: {listed}",
            hint="take them out, or write the job as a Luthier spec: `luthier recipes list`",
            where=name,
        )
