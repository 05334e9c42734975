"""The certificate of a run's result: what was claimed, what was found, and the hashes of the files it speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import ProofError
from luthier.runs.layout import MERGED_MODEL
from luthier.runs.manifest import MANIFEST, hash_file, write_durably
from luthier.runs.run import Run

CERTIFICATE = "certificate.json"
UNCERTIFIED = "uncertified"
"""The fact of a run's lineage that says why it has none."""


@dataclass(frozen=True)
class Claim:
    """One thing that must hold of an artefact, what was found of it, and what is allowed."""

    artefact: str
    claim: str
    found: str
    allowed: str
    holds: bool


@dataclass(frozen=True)
class Certificate:
    """What was claimed of a run's result, and the files that this was found of, by name from `artefact`'s parent."""

    artefact: str
    claims: tuple[Claim, ...]
    files: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        """Whether there are claims, and all hold."""
        return bool(self.claims) and all(each.holds for each in self.claims)

    @property
    def broken(self) -> list[Claim]:
        """The claims that do not hold."""
        return [each for each in self.claims if not each.holds]

    def of(self, artefact: str) -> Certificate:
        """The part that speaks of one artefact alone."""
        files = {name: digest for name, digest in self.files.items() if name.startswith(f"{artefact}/")}
        return Certificate(
            artefact, tuple(each for each in self.claims if each.artefact == artefact), files, self.facts
        )

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "valid": self.is_valid,
            "artefact": self.artefact,
            **self.facts,
            "claims": [asdict(each) for each in self.claims],
            "files": dict(self.files),
        }


def build_certificate(found: Mapping[str, Any]) -> Certificate:
    """The certificate that a file or another process holds."""
    facts = {key: value for key, value in found.items() if key not in ("valid", "artefact", "claims", "files")}
    claims = tuple(_build_claim(each) for each in found["claims"])
    files = {str(name): str(digest) for name, digest in found["files"].items()}
    return Certificate(str(found["artefact"]), claims, files, facts)


def _build_claim(found: Mapping[str, Any]) -> Claim:
    artefact, claim, measured, allowed = (str(found[key]) for key in ("artefact", "claim", "found", "allowed"))
    return Claim(artefact, claim, measured, allowed, found["holds"] is True)


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Write it, whole or not at all."""
    write_durably(path, orjson.dumps(certificate.as_dict(), option=orjson.OPT_INDENT_2) + b"\n")


def find_certificate(run: Run) -> Certificate | None:
    """The certificate in the run's folder; None where there is none, or one that cannot be read."""
    try:
        found = orjson.loads((run.folder / CERTIFICATE).read_bytes())
        certificate = build_certificate(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return certificate if found.get("valid") is certificate.is_valid else None


def is_certified_whole(run: Run) -> bool:
    """Whether a certificate, valid or not, speaks of everything that the run made; nothing is read but names."""
    certificate = find_certificate(run)
    named = {name.partition("/")[0] for name in certificate.files} if certificate else set()
    return bool(named) and all(folder.name in named for folder in list_artefacts(run))


def find_uncertifiable(run: Run) -> str:
    """Why nothing on this machine can certify a run, as it was found at its end; empty where something can."""
    return str(run.lineage.get(UNCERTIFIED) or "")


def list_artefacts(run: Run) -> list[Path]:
    """The folders in the run that a certificate must speak of: the final weights, and the model merged from them."""
    merged = run.folder / MERGED_MODEL
    return [folder for folder in (run.final_weights, merged) if folder is not None and folder.is_dir()]


def check_certificate(run: Run) -> None:
    """Raise ProofError unless the run has a valid certificate, and its files are those that it speaks of."""
    certificate = find_certificate(run)
    if certificate is None:
        is_there = (run.folder / CERTIFICATE).exists()
        what = "a certificate that cannot be read" if is_there else "no certificate"
        raise _refused(run, f"{run.id} has {what}: nothing says that its weights are what was trained")
    if not certificate.is_valid:
        said = certificate.broken[0].claim if certificate.broken else "it claims nothing"
        raise _refused(run, f"the certificate of {run.id} is not valid: {said}", details=certificate.as_dict())
    found = {f"{folder.name}/{name}": path for folder in list_artefacts(run) for name, path in list_files(folder)}
    if other := sorted(found.keys() ^ certificate.files.keys()):
        what = "it does not speak of" if other[0] in found else "it speaks of what is gone:"
        raise _refused(run, f"the certificate of {run.id} does not fit the run: {what} `{other[0]}`")
    changed = [name for name, path in found.items() if hash_file(path) != certificate.files[name]]
    if changed:
        raise _refused(run, f"`{changed[0]}` of {run.id} has changed since its certificate was made")


def _refused(run: Run, message: str, details: object = None) -> ProofError:
    return ProofError(
        message,
        hint=f"`luthier verify {run.folder}` makes it anew; --without-certificate goes on, and the lineage says so",
        where=str(run.folder / CERTIFICATE),
        details=details,
    )


def list_files(folder: Path) -> Iterable[tuple[str, Path]]:
    """Every file of an artefact but what vouches for it, by its name in the folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in (MANIFEST, CERTIFICATE):
            yield name, path


def hash_files(folder: Path, name: str) -> dict[str, str]:
    """SHA-256 of every file of an artefact, under the name of the folder."""
    return {f"{name}/{inner}": hash_file(path) for inner, path in list_files(folder)}
