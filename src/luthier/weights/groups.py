"""The three groups of layers that Tinker's protocol adapts: attention, feed-forward and the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

ATTN, MLP, UNEMBED = "attn", "mlp", "unembed"
_HEADS = ("lm_head", "embed_out", "output")
_MLP_PATH = re.compile(r"(?:^|[._])(?:mlp|feed_forward|ffn|moe|experts?|fc\d?)(?:[._]|$)")
_MLP_LEAF = re.compile(r"(?:^|_)(?:gate|up|down|fc\d?|w[123]|4h)(?:_|$)")


def group_of(module: str) -> str:
    """The group of a linear layer, by its path, or by its last name where that is all there is."""
    parents, _, leaf = module.rpartition(".")
    if leaf in _HEADS and "layer" not in parents:
        return UNEMBED
    is_mlp = _MLP_PATH.search(module) if parents else _MLP_LEAF.search(leaf) or _MLP_PATH.search(leaf)
    return MLP if is_mlp else ATTN


def find_groups(targets: str | Sequence[str]) -> set[str]:
    """The groups that targets are of; `auto` is everything but the head."""
    return {ATTN, MLP} if isinstance(targets, str) else {group_of(target) for target in targets}


def list_left_out(targets: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The last names of layers that belong to the groups of the targets, and that the targets leave out."""
    groups, named = find_groups(targets), {target.rpartition(".")[2] for target in targets}
    leaves = {module.rpartition(".")[2] for module in modules if group_of(module) in groups}
    return sorted(leaves - named)
