"""The command line starts without any heavy package, fast, and importing a module does nothing but define things."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = {"torch", "transformers", "mlx", "tinker", "fastapi", "datasets", "pandas", "pyarrow", "huggingface_hub"}
ARRAYS = {"numpy", "tokenizers", "safetensors"}
SERVICE = {"sqlalchemy", "alembic", "uvicorn", "prometheus_client", "psycopg"}
CALLS = {
    "help": ["--help"],
    "serve help": ["serve", "--help"],
    "train help": ["train", "--help"],
    "spec check": ["spec", "check", "recipes/demo-qlora.toml"],
}
LIMIT_SECONDS = 0.15
PLAN_SECONDS = 1.0
# What importing click takes where the limit was set; a slower machine gets as much more time for both.
CLICK_SECONDS = 0.035
ENTER = "from luthier.cli.main import entry; entry()"
RUN = "import sys; from luthier.cli.main import main; code = main(sys.argv[1:])"
SHOW_MODULES = "import json; sys.stderr.write(json.dumps([code, sorted(sys.modules)]))"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_command_line_starts_light(call: list[str], root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{RUN}; {SHOW_MODULES}", *call], cwd=root, capture_output=True, text=True
    )
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert not {name.partition(".")[0] for name in modules} & (HEAVY | ARRAYS | SERVICE)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_command_line_starts_fast(call: list[str], root: Path) -> None:
    # The quickest of ten tries at most: what else the machine does is not ours. The first try compiles the modules.
    limit = LIMIT_SECONDS * max(1.0, min(seconds_of(root, "import click") for _ in range(5)) / CLICK_SECONDS)
    tries: list[float] = []
    while len(tries) < 10 and (not tries or min(tries) >= limit):
        tries.append(seconds_of(root, ENTER, *call))
    assert min(tries) < limit, f"{len(tries)} tries took {', '.join(f'{each:.3f}' for each in tries)} s"


def test_a_plan_is_made_without_any_heavy_package_in_a_second(root: Path) -> None:
    call = ["plan", "recipes/demo-qlora.toml"]
    seconds_of(root, ENTER, *call)  # prepares the data, for which a fast tokenizer may load more
    done = subprocess.run(
        [sys.executable, "-c", f"{RUN}; {SHOW_MODULES}", *call], cwd=root, capture_output=True, text=True
    )
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    limit = PLAN_SECONDS * max(1.0, min(seconds_of(root, "import click") for _ in range(5)) / CLICK_SECONDS)
    assert min(seconds_of(root, ENTER, *call) for _ in range(3)) < limit


def seconds_of(root: Path, code: str, *arguments: str) -> float:
    """Processor seconds of a call: what else the machine does meanwhile is not ours."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, env=env, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


IMPORT_ALL = """
import importlib, json, logging, os, pkgutil, signal, sys, threading, warnings
import click, jinja2, numpy, orjson, pydantic, tokenizers, yaml

def facts():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "handlers": [repr(each) for each in logging.root.handlers],
        "interrupt": repr(signal.getsignal(signal.SIGINT)),
        "path": list(sys.path),
        "threads": [each.name for each in threading.enumerate()],
        "warnings": len(warnings.filters),
    }

import luthier
before = facts()
names = ["luthier", *(each.name for each in pkgutil.walk_packages(luthier.__path__, "luthier."))]
# Tests below are theirs.
HEAVY = "luthier.engines.torch.", "luthier.engines.mlx.", "luthier.training.trl.", "luthier.server."
for name in names:
    if not name.startswith(HEAVY):
        importlib.import_module(name)
after = facts()
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps({"names": names, "changed": changed, "modules": sorted(sys.modules)}))
"""


_NOT_HEAVY = "if not name.startswith(HEAVY)"
# A server is heavier than a command; its modules do no work all the same.
IMPORT_SERVER = IMPORT_ALL.replace(
    "import luthier\n", "import alembic, fastapi, prometheus_client, sqlalchemy, uvicorn\nimport luthier\n", 1
).replace(_NOT_HEAVY, 'if name.startswith("luthier.server.")')
# What torch and transformers do on import is theirs, so they come first; with them the engine does nothing more.
IMPORT_ENGINE = IMPORT_ALL.replace(
    "import luthier\n", "import safetensors.torch, torch, transformers.modeling_utils\nimport luthier\n", 1
).replace(_NOT_HEAVY, 'if name.startswith("luthier.engines.torch.")')
IMPORT_MLX = IMPORT_ALL.replace("import luthier\n", "import mlx.nn, mlx_lm, transformers\nimport luthier\n", 1).replace(
    _NOT_HEAVY, 'if name.startswith("luthier.engines.mlx.")'
)


def _imported(script: str, folder: Path) -> dict[str, Any]:
    folder = folder / "import"
    work = folder / "work"
    work.mkdir(parents=True)
    env = {"HOME": str(folder), "LUTHIER_HOME": str(folder / "home"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_importing_any_module_does_no_work(tmp_path: Path, sources: list[Path]) -> None:
    found = _imported(IMPORT_ALL, tmp_path)
    assert len(found["names"]) == len(sources)
    assert found["changed"] == {}
    assert [path.name for path in (tmp_path / "import").rglob("*")] == ["work"]
    assert not {name.partition(".")[0] for name in found["modules"]} & HEAVY


def test_importing_the_server_does_no_work(tmp_path: Path) -> None:
    found = _imported(IMPORT_SERVER, tmp_path)
    assert {"luthier.server.app", "luthier.server.running"} <= set(found["modules"])
    assert found["changed"] == {}
    assert [path.name for path in (tmp_path / "import").rglob("*")] == ["work"]
    assert not {name.partition(".")[0] for name in found["modules"]} & (HEAVY - {"fastapi"})


IMPORT_LIGHT = """
import importlib, json, pkgutil, sys
import luthier
names = [each.name for each in pkgutil.walk_packages(luthier.__path__, "luthier.")]
light = [name for name in names if name.split(".")[1] in ("cli", "spec", "errors", "extras")]
for name in light:
    importlib.import_module(name)
print(json.dumps({"names": light, "modules": sorted(sys.modules)}))
"""


def test_command_line_and_spec_need_no_arrays(tmp_path: Path) -> None:
    found = _imported(IMPORT_LIGHT, tmp_path)
    assert len(found["names"]) > 25
    assert not {name.partition(".")[0] for name in found["modules"]} & (HEAVY | ARRAYS)


@pytest.mark.slow
@pytest.mark.torch
def test_importing_the_torch_engine_does_no_work(tmp_path: Path) -> None:
    found = _imported(IMPORT_ENGINE, tmp_path)
    assert {"luthier.engines.torch.engine", "luthier.engines.torch.loading"} <= set(found["modules"])
    assert found["changed"] == {}
    assert [path.name for path in (tmp_path / "import").rglob("*")] == ["work"]


@pytest.mark.slow
def test_importing_the_mlx_engine_does_no_work(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    found = _imported(IMPORT_MLX, tmp_path)
    assert {"luthier.engines.mlx.engine", "luthier.engines.mlx.loading"} <= set(found["modules"])
    assert found["changed"] == {}
    assert [path.name for path in (tmp_path / "import").rglob("*")] == ["work"]
