"""The model card that lies beside weights: what they were trained from, on what, how well, and how to load them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

CARD = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_REVISION = re.compile(r"[\w./-]+")


@dataclass(frozen=True)
class CardFacts:
    """What a card says; all of it comes from the run's plan, its lineage and its report."""

    name: str
    base: str
    method: str
    objective: str
    revision: str | None = None
    is_adapter: bool = True
    parents: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evidence: Mapping[str, str] = field(default_factory=dict)
    """What was proved and compared, in words."""
    data_hash: str = ""
    plan_hash: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def write_card(folder: Path, facts: CardFacts) -> None:
    """The card as the folder's README.md."""
    (folder / CARD).write_text(render_card(facts), "utf-8")


def render_card(facts: CardFacts) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    kind = "adapter" if facts.is_adapter else "model"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=True, allow_unicode=True)}---\n",
        f"# {_plain(facts.name)}\n",
        f"A {kind} that Luthier trained from {_base_words(facts)}: method {_plain(facts.method)}, "
        f"objective {_plain(facts.objective)}.\n",
        "## Load it\n",
        _loading(facts),
    ]
    if facts.metrics:
        shown = {name: f"{value:.4g}" for name, value in facts.metrics.items()}
        parts += ["## Results\n", _table("metric", "value", shown)]
    if facts.evidence:
        parts += ["## Evidence\n", _table("what", "found", facts.evidence)]
    if facts.settings:
        parts += ["## Settings\n", _table("setting", "value", facts.settings)]
    parts += ["## Lineage\n", _table("what", "which", _lineage(facts))]
    return "\n".join(parts)


def _front_matter(facts: CardFacts) -> dict[str, object]:
    front: dict[str, object] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"luthier", facts.method, facts.objective, *(["lora"] if facts.is_adapter else [])}),
    }
    # A hub refuses a folder's path here, and a path says things about the machine it lay on.
    if _HUB_ID.fullmatch(facts.base):
        front |= {"base_model": facts.base, "base_model_relation": "adapter" if facts.is_adapter else "finetune"}
    return front


def _base_name(facts: CardFacts) -> str:
    return facts.base if _HUB_ID.fullmatch(facts.base) else Path(facts.base).name


def _base_words(facts: CardFacts) -> str:
    revision = f" at revision {_plain(facts.revision)}" if facts.revision else ""
    return f"{_plain(_base_name(facts))}{revision}"


def _loading(facts: CardFacts) -> str:
    name = _base_name(facts) if facts.is_adapter else "path/to/this/folder"
    revision = ""
    if facts.is_adapter and facts.revision and _REVISION.fullmatch(facts.revision):
        revision = f', revision="{facts.revision}"'
    quoted = '"' + re.sub(r"[^\w./ -]", "_", name) + '"'
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({quoted}{revision})",
        f'model = AutoModelForCausalLM.from_pretrained({quoted}{revision}, dtype="auto")',
    ]
    if facts.is_adapter:
        lines.insert(0, "from peft import PeftModel")
        for parent in facts.parents:
            place = re.sub(r"[^\w.-]", "_", parent)
            lines.append(f'model = PeftModel.from_pretrained(model, "path/to/{place}").merge_and_unload()')
        lines.append('model = PeftModel.from_pretrained(model, "path/to/this/folder")')
    return "\n".join(["```python", *lines, "```", ""])


def _lineage(facts: CardFacts) -> dict[str, object]:
    found: dict[str, object] = {"base": _base_name(facts), "revision": facts.revision or ""}
    found |= {"trained after": ", ".join(facts.parents), "data": facts.data_hash, "plan": facts.plan_hash}
    found |= dict(facts.versions)
    return {key: value for key, value in found.items() if value}


def _table(left: str, right: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    lines += [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows.items()]
    return "\n".join([*lines, ""])


def _plain(value: object) -> str:
    """Somebody else's words as they are: no markup, no line of their own."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`|<>\[\]!*])", lambda match: f"&#{ord(match[0])};", text)
