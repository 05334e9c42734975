"""Files of strangers, checked in a process with limits: `python -m luthier.jobs.checking FOLDER` reads its order there.

A file is checked as `luthier data check` does it. A job's files are checked with the base's own template and tokenizer,
and the run is planned; the tokens that this makes are what the trainer will train.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from luthier.errors import DataError, LuthierError, MissingPathError, PlanError, TemplateError
from luthier.jobs.launchers.local import trainer_environment
from luthier.jobs.processes import end_session
from luthier.machine import MEMORY_VARIABLE

if TYPE_CHECKING:
    from luthier.data.prepared import Prepared
    from luthier.jobs.capacity import Needs
    from luthier.spec.run import RunSpec

log = logging.getLogger("luthier.checking")
INVALID_FILE = "invalid_training_file"
TOO_MUCH = "check_out_of_bounds"
MOST_PROBLEMS = 20
_ORDER, _REPORT, _STAGE, _LOG = "order.json", "report.json", "stage", "log.txt"
_SIGNAL_OF_PARENTS_DEATH = 1
_MIB = 1 << 20
_PACKED_SLACK = 64 << 20
_CHUNK = 1 << 20
# Under a limit of memory an import that fails looks like a bug; so the code is there before the limit is.
_LOADED_BEFORE = ("luthier.workflow", "luthier.data.tokens", "luthier.training.planner", "luthier.jobs.capacity")
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_PACKINGS = (".gz", ".zst")


@dataclass(frozen=True)
class Limits:
    """What a check may take."""

    memory_bytes: int = 4 << 30
    cpu_seconds: float = 1800.0
    wall_seconds: float = 3600.0
    template_memory_bytes: int = 512 << 20
    template_cpu_seconds: float = 5.0
    ratio: float = 100.0
    """How many times larger a packed file may become."""
    unpacked_bytes: int = 16 << 30


@dataclass(frozen=True)
class FileReport:
    """What was found: of a file, or of a job's files with what the job needs."""

    ok: bool
    code: str | None = None
    message: str = ""
    rows: int = 0
    malformed: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[Mapping[str, Any], ...] = ()
    """The first bad rows: file, line, reason and message."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Steps, examples, tokens and an estimate of the seconds, of a job."""
    is_final: bool = True
    """False where the machine and not the file was at fault: try again."""

    def as_dict(self) -> dict[str, Any]:
        """For a row, a route or an event."""
        return asdict(self)


def safe_name(filename: str, name: str) -> str:
    """A name of ours with the ending of a person's file, so that its format is known and nothing else of it is used."""
    suffixes = [each.lower() for each in Path(filename).suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in _PACKINGS else ""
    ending = suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES else ".jsonl"
    return f"{name}{ending}{packing}"


def check_file(
    path: Path, limits: Limits | None = None, *, filename: str = "file.jsonl", max_rejected_share: float = 0.05
) -> FileReport:
    """A file that was sent, checked in a process of its own; waits for it. Nothing of it stays on the disk."""
    order = {"kind": "file", "path": str(path.resolve()), "filename": filename, "share": max_rejected_share}
    with tempfile.TemporaryDirectory(prefix="luthier-check-") as place:
        check = Check(Path(place), order, trainer_environment(Path(place) / "home", None), limits)
        try:
            return check.wait()
        finally:
            check.stop()


class Check:
    """A check that goes on in its process. The folder is the caller's, and holds the order, the report and the log."""

    def __init__(
        self, folder: Path, order: Mapping[str, Any], environment: Mapping[str, str], limits: Limits | None = None
    ) -> None:
        self._folder, self._limits = folder, limits or Limits()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_REPORT, _STAGE):
            (folder / name).unlink(missing_ok=True)
        (folder / _ORDER).write_bytes(orjson.dumps({**order, "limits": asdict(self._limits)}))
        self._until = time.monotonic() + self._limits.wall_seconds
        with (folder / _LOG).open("ab") as said:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "luthier.jobs.checking", str(folder)],
                cwd=folder,
                env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process, which leads a session of its own."""
        return self._process.pid

    def poll(self) -> FileReport | None:
        """The report, once there is one; a check that takes too long is ended."""
        code = self._process.poll()
        if code is None and time.monotonic() < self._until:
            return None
        if code is None:
            self.stop()
            return _out_of_bounds(self._stage(), f"it took more than {self._limits.wall_seconds:.0f} s")
        return self._read(code)

    def wait(self) -> FileReport:
        """The same, waited for."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, self._until - time.monotonic()))
        found = self.poll()
        while found is None:
            time.sleep(0.01)
            found = self.poll()
        return found

    def stop(self) -> None:
        """End it and whatever it started."""
        if self._process.poll() is None:
            end_session(self._process.pid)
            self._process.wait()

    def _stage(self) -> str:
        with suppress(OSError):
            return (self._folder / _STAGE).read_text("ascii")
        return ""

    def _read(self, code: int) -> FileReport:
        with suppress(OSError, ValueError, TypeError):
            found = orjson.loads((self._folder / _REPORT).read_bytes())
            return FileReport(**{**found, "problems": tuple(found["problems"])})
        stage, limits = self._stage(), self._limits
        if stage == "template" and code in (-signal.SIGXCPU, -signal.SIGABRT, -signal.SIGSEGV):
            return FileReport(False, TemplateError.code, "the model's chat template ran away: it took too much time")
        if code == -signal.SIGXCPU:
            return _out_of_bounds(stage, f"it took more than {limits.cpu_seconds:.0f} s of a processor")
        if code in (-signal.SIGABRT, -signal.SIGSEGV):
            return _out_of_bounds(stage, f"it took more than {limits.memory_bytes / (1 << 30):.1f} GiB of memory")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return FileReport(False, "internal_error", f"the process that checks the rows {how}", is_final=False)


def _out_of_bounds(stage: str, why: str) -> FileReport:
    return FileReport(False, TOO_MUCH, f"the rows cannot be checked ({stage or 'start'}): {why}")


# -- in the process ------------------------------------------------------------------------------------------------


def main(place: str) -> int:
    """Check what the order in the folder says, and write the report beside it."""
    logging.basicConfig(level=logging.INFO)
    _follow_parent()
    folder = Path(place)
    order = orjson.loads((folder / _ORDER).read_bytes())
    limits = Limits(**order["limits"])
    for name in _LOADED_BEFORE:
        importlib.import_module(name)
    report = _report(_Checking(folder, limits), order)
    draft = folder / f"{_REPORT}.draft"
    draft.write_bytes(orjson.dumps(report.as_dict()))
    draft.replace(folder / _REPORT)
    return 0


def _report(checking: _Checking, order: Mapping[str, Any]) -> FileReport:
    """The edge of the process: whatever happens becomes a report."""
    checking.set_limits()
    try:
        return checking.check_file(order) if order["kind"] == "file" else checking.check_job(order)
    except DataError as error:
        return FileReport(False, INVALID_FILE, error.message, problems=_places(error.details))
    except MissingPathError as error:
        return FileReport(False, INVALID_FILE, error.message)
    except LuthierError as error:
        return FileReport(False, error.code, error.message)
    except MemoryError:
        return _out_of_bounds(checking.stage, f"it took more than {checking.limits.memory_bytes / (1 << 30):.1f} GiB")
    except Exception as error:
        log.exception("not foreseen")
        said = f"an error of Luthier's own: {type(error).__name__}"
        return FileReport(False, "internal_error", said, is_final=False)


class _Checking:
    """The stages of a check, each with its limits."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder, self.limits = folder, limits
        self.stage = "start"

    def set_limits(self) -> None:
        """Those of the whole check; what is over them ends the process, and the parent says why."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._allow(self.limits.cpu_seconds, self.limits.memory_bytes)

    def _allow(self, cpu_seconds: float, memory_bytes: int) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + cpu_seconds) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + memory_bytes, hard))

    def _begin(self, stage: str) -> None:
        self.stage = stage
        (self._folder / _STAGE).write_text(stage)

    def check_file(self, order: Mapping[str, Any]) -> FileReport:
        """A file by itself: rows of any kind, without a model."""
        from luthier.spec.run import RunSpec
        from luthier.workflow import prepare_data

        named = self._folder / safe_name(order["filename"], "file")
        named.symlink_to(order["path"])
        self._check_packed(named)
        self._begin("rows")
        tables = {"model": {"base": "practice"}, "data": {"train": str(named), "valid": 0, "max_rejected_share": 1.0}}
        spec = RunSpec.model_validate(tables)
        prepared = prepare_data(spec, with_model=False, any_kind=True, may_be_empty=True)
        return _judge(prepared, order["share"])

    def check_job(self, order: Mapping[str, Any]) -> FileReport:
        """The rows of a job as it will train them, and its plan."""
        from luthier.runs.model_folder import check_name
        from luthier.spec.run import RunSpec
        from luthier.workflow import prepare_data

        spec = RunSpec.model_validate(order["spec"])
        check_name(spec.model.base)
        self._check_template(spec)
        for name in (spec.data.train, spec.data.valid):
            if isinstance(name, str):
                self._check_packed(Path(name))
        self._begin("rows")
        lenient = spec.model_copy(update={"data": spec.data.model_copy(update={"max_rejected_share": 1.0})})
        prepared = prepare_data(lenient, may_be_empty=True)
        report = _judge(prepared, spec.data.max_rejected_share)
        return self._plan(spec, prepared, order, report) if report.ok else report

    def _check_template(self, spec: RunSpec) -> None:
        """Compiled and rendered once under limits of its own: a sandbox does not keep a template from `'a' * 10**9`."""
        from luthier.data.reasons import RowError
        from luthier.data.tokens import ModelText
        from luthier.runs.resolve import resolve_model

        text = ModelText(resolve_model(spec.model.base, revision=spec.model.revision))
        self._begin("template")
        self._allow(self.limits.template_cpu_seconds, self.limits.template_memory_bytes)
        try:
            if template := text.build_template():
                turns: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
                template.render(turns)
        except RowError:
            pass  # it may ask for a system turn, say; the rows will show
        except MemoryError:
            raise TemplateError("the model's chat template ran away: it took too much memory") from None
        self._allow(self.limits.cpu_seconds, self.limits.memory_bytes)

    def _check_packed(self, path: Path) -> None:
        """Refuse a small file that becomes a large one before anything reads it."""
        if path.suffix.lower() not in _PACKINGS:
            return
        from luthier.data.source import open_unpacked

        self._begin("unpacking")
        packed, unpacked = path.stat().st_size, 0
        most = min(self.limits.unpacked_bytes, packed * self.limits.ratio + _PACKED_SLACK)
        with open_unpacked(path) as file:
            while chunk := file.read(_CHUNK):
                unpacked += len(chunk)
                if unpacked > most:
                    raise DataError(
                        f"{path.name}: {packed / _MIB:.1f} MiB that become more than {most / _MIB:.0f} MiB unpacked",
                        hint="send the rows as plain JSONL",
                    )

    def _plan(self, spec: RunSpec, prepared: Prepared, order: Mapping[str, Any], report: FileReport) -> FileReport:
        from luthier.jobs.capacity import needs_of
        from luthier.workflow import plan_run

        self._begin("plan")
        for last, memory_bytes in ((False, order.get("share_bytes")), (True, order.get("memory_bytes"))):
            if memory_bytes:
                os.environ[MEMORY_VARIABLE] = str(memory_bytes)
            elif not last:
                continue
            try:
                plan = plan_run(spec, prepared)
            except PlanError:
                if last:
                    raise
                continue
            break
        needs: Needs = needs_of(plan)
        facts = {
            "steps": plan.steps,
            "train_examples": plan.train_examples,
            "tokens_per_epoch": plan.tokens_per_epoch,
            "trained_tokens_per_epoch": plan.trained_tokens_per_epoch,
            "seconds": plan.seconds,
            "device": plan.device,
        }
        return replace(report, needs=needs.as_dict(), plan=facts)


def _judge(prepared: Prepared, share: float) -> FileReport:
    """Whether enough of the rows are good, and which are not."""
    from luthier.workflow import nothing_left

    summary = prepared.summary
    rows, malformed = int(summary["rows"]), int(summary["malformed"])
    report = FileReport(
        ok=True,
        rows=rows,
        malformed=malformed,
        formats=summary["formats"],
        reasons=summary["reasons"],
        problems=_rejected(prepared.folder / "rejected.jsonl"),
    )
    if malformed > share * rows:
        first = report.problems[0]
        said = f"{malformed:,} of {rows:,} rows cannot be used; the first is line {first['line']}: {first['message']}"
        return replace(report, ok=False, code=INVALID_FILE, message=said)
    if summary["train"] == 0:
        return replace(report, ok=False, code=INVALID_FILE, message=nothing_left(summary).message)
    return report


def _rejected(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The first bad rows by place and reason; what stands in them is left out."""
    found: list[Mapping[str, Any]] = []
    with path.open("rb") as lines:
        for line in lines:
            entry = orjson.loads(line)
            found.append({key: entry.get(key) for key in ("file", "line", "reason", "message")})
            if len(found) == MOST_PROBLEMS:
                break
    return tuple(found)


def _places(details: object) -> tuple[Mapping[str, Any], ...]:
    """The rows that an error names as `file:line`."""
    found = []
    for each in details if isinstance(details, list) else []:
        if isinstance(each, dict) and isinstance(each.get("where"), str):
            file, _, line = each["where"].rpartition(":")
            number = int(line) if line.isdigit() else None
            found.append({"file": file, "line": number, "reason": "mask_invalid", "message": each.get("message", "")})
    return tuple(found[:MOST_PROBLEMS])


def _mapped_bytes() -> int:
    """Address space taken so far, which counts against its limit."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _follow_parent() -> None:
    """Nothing goes on checking for a server that is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL, 0, 0, 0)


def link_rows(path: Path, folder: Path, name: str) -> Path:
    """A stored file under a name that says its format, in the job's own folder: the same at every attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if link.is_symlink() and link.readlink() == path.resolve():
        return link
    draft = folder / f"{name}.draft"
    draft.unlink(missing_ok=True)
    draft.symlink_to(path.resolve())
    draft.replace(link)
    return link


def drop_tokens(folder: Path) -> None:
    """Remove the token cache of a job that has ended."""
    shutil.rmtree(folder / "tokens", ignore_errors=True)


if __name__ == "__main__":
    code = main(sys.argv[1])
    logging.shutdown()
    os._exit(code)
