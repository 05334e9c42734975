#!/usr/bin/env bash
# The main job on the practice model and the demo data, offline: what `make demo` runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LUTHIER_HOME="${LUTHIER_HOME:-build/demo}"

say() { printf '\n== %s\n\n$ %s\n' "$1" "$2"; }

run() {
    say "$1" "${*:2}"
    "${@:2}"
}

run "1. Every row of the demo file, in exactly one place. A handful are bad on purpose, and each is named." \
    luthier data check examples/demo/train.jsonl --model practice
run "2. Two rows as the model will see them. Green (or between guillemets) is what is trained." \
    luthier data show examples/demo/train.jsonl --model practice -n 2
run "3. A recipe from its spec to the door of training: the same rows, checked, split, masked and cached." \
    luthier train recipes/demo-qlora.toml --dry-run

printf '\nThe proofs of the data hold. Training itself is the next wing of the house.\n'
