"""The one tree of errors: each has a code, a hint with the next command, and an exit code.

    LuthierError
    |-- CallError          the command or function was called wrongly
    |-- SpecError          the run spec does not hold
    |   `-- MissingGpuTypeError  a Synth job names no kind of accelerator
    |-- DataError          rows, files or splits do not hold
    |   |-- RejectedRowsError   more bad rows than the spec allows
    |   |-- MaskError      the tokens to train cannot be told, or there are none
    |   `-- LedgerError    the counts of the ledger do not add up
    |-- MissingPathError   a file or folder that was named is not there
    |-- ModelError         a model folder cannot be used
    |   `-- TemplateError  a chat template cannot be used
    |-- MissingExtraError  an optional package is not installed
    |-- UnsupportedError   asked for something this engine or version cannot do
    |-- PlanError          the run does not fit this machine
    |-- RunError           a run folder cannot be used
    |   |-- RunLockedError      another process trains the run
    |   `-- CheckpointError     a checkpoint is not what its manifest says
    |-- HubError           the model hub refused, or could not be reached
    |-- JudgeError         the model that judges answers refused, or could not be reached
    |-- SinkError          another place for a run's events could not be opened
    |-- HostError          the process that holds a model died, or has no room
    |-- StorageError       the disk refused
    |   `-- DiskFullError       there is no room left
    |-- TrainingError      training cannot go on
    |   |-- NonFiniteError      loss or gradient is not finite
    |   |-- OutOfMemoryError    memory ran out with one row at once
    |   |-- NothingLearnedError the final weights are the first ones, or not finite
    |   |-- ProcessDiedError    one of several processes died
    |   `-- ResumeError         the run cannot be resumed as it is
    |-- ServiceError     the job service refused
    |   |-- NotFoundError       there is no such thing, or it is another project's
    |   |-- ConflictError       it cannot be done in the state that things are in
    |   |   `-- StaleAttemptError   the attempt no longer holds its job
    |   |-- IdempotencyError    the same idempotency key came with another request
    |   |-- QuotaError          the project has as much as it may have
    |   |-- AuthError           no key, or none that holds
    |   |-- ScopeError          the key does not reach that far
    |   |-- TooLargeError       more bytes than are taken
    |   `-- DatabaseError       the database cannot be reached, or did not take a write
    |-- ServerError        a server refused what was asked
    |-- ServerGoneError    a server cannot be reached
    `-- ProofError         a proof did not hold

To add one: derive it from the nearest class and from the standard exception that a caller would expect,
give it a `code` of its own and one sentence as its docstring (the reference page is made from it).
"""

from __future__ import annotations

from collections.abc import Mapping


class LuthierError(Exception):
    """Something failed; every error of Luthier is one of these."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", where: str = "", details: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where
        self.details = details

    def as_dict(self) -> dict[str, object]:
        """The error as every `--json` output and every route of ours shows it."""
        shown: dict[str, object] = {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "where": self.where,
        }
        if self.details is not None:
            shown["details"] = self.details
        return shown


class CallError(LuthierError, ValueError):
    """A command was called wrongly: an unknown flag, a missing argument, a value out of range."""

    code = "call_invalid"
    exit_code = 2


class SpecError(LuthierError, ValueError):
    """The run spec has unknown keys, wrong values or parts that contradict each other."""

    code = "spec_invalid"
    exit_code = 2


class MissingGpuTypeError(SpecError):
    """A Synth job does not say which kind of accelerator it wants; its clients always do."""

    code = "missing_gpu_type"


class DataError(LuthierError, ValueError):
    """The data cannot be used as it is: unreadable, empty, or of no known format."""

    code = "data_invalid"


class RejectedRowsError(DataError):
    """More rows were rejected than `data.max_rejected_share` allows."""

    code = "data_rejected"


class MaskError(DataError):
    """The tokens to train cannot be told exactly, there are none, or the end of turn is not among them."""

    code = "mask_invalid"


class LedgerError(DataError):
    """The ledger does not add up: a row is in no place or in two. A bug of ours; the run stops."""

    code = "ledger_unbalanced"


class MissingPathError(LuthierError, FileNotFoundError):
    """A file or folder that was named does not exist."""

    code = "path_missing"
    exit_code = 2


class ModelError(LuthierError, ValueError):
    """A model name leads nowhere, or the folder cannot be used safely."""

    code = "model_invalid"


class TemplateError(ModelError):
    """A chat template is missing, too large, refused a conversation, or broke out of its sandbox."""

    code = "template_invalid"


class MissingExtraError(LuthierError, ImportError):
    """An optional package is needed and not installed; the hint is the install command."""

    code = "extra_missing"


class UnsupportedError(LuthierError, NotImplementedError):
    """What was asked for is known, and this engine or this version cannot do it."""

    code = "unsupported"


class PlanError(LuthierError, MemoryError):
    """The run needs more than this machine has; the error says how much of what, and what would help."""

    code = "plan_does_not_fit"


class HubError(LuthierError, ConnectionError):
    """The model hub refused what was asked of it, or could not be reached."""

    code = "hub_refused"


class JudgeError(LuthierError, ConnectionError):
    """The endpoint of a judging model could not be reached, refused, or answered something else than a judgement."""

    code = "judge_failed"


class SinkError(LuthierError, ConnectionError):
    """A place that a run's events shall also go to could not be opened; nothing was trained yet."""

    code = "sink_refused"


class HostError(LuthierError, RuntimeError):
    """The process that keeps a model in memory died, or too many models are asked for at a time."""

    code = "unavailable"


class StorageError(LuthierError, OSError):
    """The disk refused: full, read-only or without permission."""

    code = "storage_refused"


class DiskFullError(StorageError):
    """No room is left on the disk; nothing that was there before is lost."""

    code = "disk_full"


class RunError(LuthierError, ValueError):
    """A run folder is not there, or is not one, or holds something else than what was asked of it."""

    code = "run_invalid"


class RunLockedError(RunError):
    """Another process is training this run."""

    code = "run_locked"


class CheckpointError(RunError):
    """A sealed folder is not what its manifest says: a file is missing, added, cut or changed."""

    code = "checkpoint_broken"


class TrainingError(LuthierError, RuntimeError):
    """Training cannot go on, or what it made cannot be trusted."""

    code = "training_failed"


class NonFiniteError(TrainingError):
    """The loss or a gradient is not a finite number; the step was not taken, and its rows are named."""

    code = "non_finite_loss"


class OutOfMemoryError(TrainingError):
    """Memory ran out even with a single row at once."""

    code = "out_of_memory"


class NothingLearnedError(TrainingError):
    """The final weights are those the run started with, or are not finite."""

    code = "nothing_learned"


class ProcessDiedError(TrainingError):
    """One of the processes of a run died; the error names it."""

    code = "process_died"


class ResumeError(TrainingError):
    """The run cannot be resumed as it is: nothing to resume from, or what it depends on has changed."""

    code = "resume_refused"


class ServiceError(LuthierError):
    """The job service refused; each kind of refusal is a class of its own."""

    code = "service_refused"


class NotFoundError(ServiceError, LookupError):
    """There is no job, file, upload, model or key of this id in the project that asks."""

    code = "not_found"


class ConflictError(ServiceError):
    """What was asked does not go with the state that things are in; the message names that state."""

    code = "conflict"


class StaleAttemptError(ConflictError):
    """The attempt no longer holds its job: it ended, was given up, or another holds it. Nothing was written."""

    code = "stale_attempt"


class IdempotencyError(ServiceError, ValueError):
    """An idempotency key was used before, with another request."""

    code = "idempotency_mismatch"


class QuotaError(ServiceError):
    """The project has as many unfinished jobs, or as many bytes, as it may have."""

    code = "quota_exceeded"


class AuthError(ServiceError, PermissionError):
    """There is no API key, or it is unknown, revoked or expired."""

    code = "unauthorized"


class ScopeError(ServiceError, PermissionError):
    """The API key is good, and its scope does not reach as far as what was asked."""

    code = "forbidden"


class TooLargeError(ServiceError, ValueError):
    """More bytes came than are taken at once."""

    code = "too_large"


class DatabaseError(ServiceError, ConnectionError):
    """The database cannot be reached, or did not take a write in time; nothing was kept, and asking again is right."""

    code = "database_unavailable"


class ServerError(LuthierError, RuntimeError):
    """A server refused what was asked; its own words and code are told."""

    code = "server_refused"
    status = 0
    headers: Mapping[str, str] = {}


class ServerGoneError(LuthierError, ConnectionError):
    """A server cannot be reached, or stopped answering."""

    code = "server_unreachable"


class ProofError(LuthierError, AssertionError):
    """A proof did not hold; the error says where the two sides part."""

    code = "proof_failed"
