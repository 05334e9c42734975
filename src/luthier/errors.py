"""The one tree of errors: each has a code, a hint with the next command, and an exit code.

    LuthierError
    |-- CallError          the command or function was called wrongly
    |-- SpecError          the run spec does not hold
    |-- DataError          rows, files or splits do not hold
    |   |-- RejectedRowsError   more bad rows than the spec allows
    |   |-- MaskError      the tokens to train cannot be told, or there are none
    |   `-- LedgerError    the counts of the ledger do not add up
    |-- MissingPathError   a file or folder that was named is not there
    |-- ModelError         a model folder cannot be used
    |   `-- TemplateError  a chat template cannot be used
    |-- MissingExtraError  an optional package is not installed
    |-- UnsupportedError   asked for something this engine or version cannot do
    `-- StorageError       the disk refused

To add one: derive it from the nearest class and from the standard exception that a caller would expect,
give it a `code` of its own and one sentence as its docstring (the reference page is made from it).
"""

from __future__ import annotations


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


class StorageError(LuthierError, OSError):
    """The disk refused: full, read-only or without permission."""

    code = "storage_refused"
