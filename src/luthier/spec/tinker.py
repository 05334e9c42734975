"""What a Tinker service cannot be asked for: each key that it would not honour is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.spec.method import AdapterKeys

if TYPE_CHECKING:
    from luthier.spec.run import RunSpec

ALPHA = 32.0
"""The scale of every adapter of the protocol, whatever its rank; no request sets it."""


def find_beyond_tinker(spec: RunSpec) -> list[tuple[str, str]]:
    """(key path, message) for each setting that the protocol has no place for."""
    method = spec.method
    if not isinstance(method, AdapterKeys) or method.kind == "qlora":
        return [("method.kind", f'engine `tinker` trains LoRA only, found "{method.kind}"'), *_of_the_rest(spec)]
    found = []
    if method.alpha != ALPHA:
        found.append(("method.alpha", f"a Tinker service scales every adapter by {ALPHA:g}, found {method.alpha:g}"))
    if method.dropout not in (0.0, type(method).model_fields["dropout"].default):
        found.append(("method.dropout", f"a Tinker service has no dropout, found {method.dropout:g}; set it to 0"))
    if method.rslora:
        found.append(("method.rslora", "a Tinker service scales by alpha / rank alone"))
    if method.last_layers is not None:
        found.append(("method.last_layers", "a Tinker service adapts every layer of a group, or none"))
    if method.also_train:
        found.append(("method.also_train", "a Tinker service trains adapters alone; it adapts the head as a target"))
    return found + _of_the_rest(spec)


def _of_the_rest(spec: RunSpec) -> list[tuple[str, str]]:
    compute, found = spec.compute, []
    if spec.optim.kind != "adamw":
        found.append(("optim.kind", f'a Tinker service has "adamw", found "{spec.optim.kind}"'))
    if compute.precision == "fp16" or compute.parallelism.fp16:
        key = "precision" if compute.precision == "fp16" else "parallelism.fp16"
        found.append((f"compute.{key}", "Tinker services compute in bf16 or fp32"))
    if compute.recompute != "auto" or compute.parallelism.activation_checkpointing is not None:
        key = "recompute" if compute.recompute != "auto" else "parallelism.activation_checkpointing"
        found.append((f"compute.{key}", "the service manages its own memory"))
    if spec.evaluate.best_metric == "token_accuracy":
        found.append(("evaluate.best_metric", 'a Tinker service does not say which token was likeliest; take "loss"'))
    return found
