"""Trainers as processes of this machine, each with a session of its own, so that they outlive the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from luthier.jobs.attempt import LOG, Identity
from luthier.jobs.capacity import Capacity, find_capacity
from luthier.jobs.launchers import Ended, Launch, SignalName
from luthier.jobs.processes import end_session, when_started
from luthier.machine import MEMORY_VARIABLE
from luthier.runs.model_folder import MODELS_VARIABLE

# All that a trainer may know of the server's environment: no key, no token, no address of a database is among it.
ALLOWED = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV"),
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_DEVICE_ORDER"),
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "SYSTEMROOT"),
    }
)
ALLOWED_ONLINE = frozenset(
    {
        *("HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
        *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    }
)
"""And where models may be fetched from the hub."""
_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "USE_HUB_KERNELS": "0"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_LOG_BYTES = 16 << 10


def trainer_environment(
    home: Path, models: Path | None, *, tokens: Path | None = None, inherited: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a trainer or a check is given: the allowed names, and where things are. With a models folder, no network."""
    given = os.environ if inherited is None else inherited
    allowed = ALLOWED if models is not None else ALLOWED | ALLOWED_ONLINE
    found = {name: value for name, value in given.items() if name in allowed}
    found |= {"LUTHIER_HOME": str(home), **_QUIET}
    if tokens is not None:
        found["LUTHIER_TOKENS"] = str(tokens)
    if models is not None:
        found |= {MODELS_VARIABLE: str(models), **_OFFLINE}
    return found


class LocalLauncher:
    """The five calls for subprocesses. It knows the exit codes of those it started itself."""

    def __init__(self, home: Path, models: Path | None = None, *, more: Mapping[str, str] | None = None) -> None:
        self._home, self._models, self._more = home, models, dict(more or {})
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def submit(self, launch: Launch) -> Identity:
        """A new process, its output in the attempt's log."""
        child = self._start(["-m", "luthier.jobs.child", str(launch.folder)], launch)
        self._children[child.pid] = child
        return Identity(child.pid, when_started(child.pid) or "", launch.token)

    def _start(self, arguments: Sequence[str], launch: Launch) -> subprocess.Popen[bytes]:
        environment = trainer_environment(self._home, self._models, tokens=launch.folder.parent) | self._more
        if launch.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(each) for each in launch.devices)
        if launch.threads is not None:
            environment["OMP_NUM_THREADS"] = str(launch.threads)
        if launch.memory_bytes is not None:
            environment[MEMORY_VARIABLE] = str(launch.memory_bytes)
        with (launch.folder / LOG).open("ab") as log:
            return subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", *arguments],
                cwd=launch.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def poll(self, ref: Identity) -> Ended | None:
        """Whether it is gone."""
        child = self._children.get(ref.pid)
        if child is not None:
            if child.poll() is None:
                return None
            del self._children[ref.pid]
            return Ended(child.returncode)
        return None if self._is_there(ref) else Ended()

    def signal(self, ref: Identity, name: SignalName) -> None:
        """Only ever to the process that was verified to be the trainer, and to its own session."""
        if not self._is_there(ref):
            return
        if name == "KILL":
            end_session(ref.pid)
            return
        with suppress(ProcessLookupError, PermissionError):
            os.kill(ref.pid, signal.SIGTERM)

    def logs(self, launch: Launch) -> str:
        """The last kilobytes of the log."""
        try:
            with (launch.folder / LOG).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _LOG_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def capacity(self) -> Capacity:
        """This machine."""
        return find_capacity()

    def _is_there(self, ref: Identity) -> bool:
        return bool(ref.started) and when_started(ref.pid) == ref.started
