"""The files of a model folder that are not weights: configuration, tokenizer, templates, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.runs.manifest import MANIFEST
from luthier.weights.peft import CONFIG
from luthier.weights.tensors import INDEX

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")
# What speaks of the weights beside it, and would not be true of others.
_OF_WEIGHTS = (INDEX, CONFIG, MANIFEST, "certificate.json")


def copy_text_files(model: Path, folder: Path) -> None:
    """Copy them beside other weights; what is there already stays as it is."""
    for pattern in _PATTERNS:
        for path in sorted(model.glob(pattern)):
            target = folder / path.relative_to(model)
            if path.is_file() and path.name not in _OF_WEIGHTS and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
