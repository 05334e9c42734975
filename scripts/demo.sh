#!/usr/bin/env bash
# The main job on the practice model and the demo data, offline: what `make demo` runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LUTHIER_HOME="${LUTHIER_HOME:-build/demo}"
runs="build/demo/runs"
heldout="examples/demo/heldout.jsonl"

run() {
    printf '\n== %s\n\n$ %s\n' "$1" "${*:2}"
    "${@:2}"
}

run "1. Every row of the demo file, in exactly one place. A handful are bad on purpose, and each is named." \
    luthier data check examples/demo/train.jsonl --model practice
run "2. Two rows as the model will see them. Green (or between guillemets) is what is trained." \
    luthier data show examples/demo/train.jsonl --model practice -n 2
run "3. Fine-tune the practice model by QLoRA: plan first, then a line that says how it goes." \
    luthier train recipes/demo-qlora.toml --output-dir "$runs"
tuned=$(find "$runs" -maxdepth 1 -name 'qlora_*' -type d -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)
run "4. Does it write orders as JSON now? 200 orders that were never trained, before and after." \
    luthier evaluate "$tuned" --data "$heldout" --base-too --wrong 0

printf '\nThe run lies in %s. Try: luthier rows %s --step 1\n' "$tuned" "$tuned"
