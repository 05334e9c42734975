#!/usr/bin/env bash
# The main job on the practice model and the demo data, offline: what `make demo` runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LUTHIER_HOME="${LUTHIER_HOME:-build/demo}"
RUNS="$LUTHIER_HOME/runs"
HELDOUT=examples/demo/heldout.jsonl
SECONDS=0

run() {
    printf '\n== %s\n\n$ %s\n' "$1" "${*:2}"
    "${@:2}"
}

cat <<'STORY'
The job: a small model shall learn to write the sentence of an order as JSON.
The model ships with Luthier, the rows are in examples/demo/. No network, no GPU, no account.
STORY
run "1. Is the data sound? Every row is in exactly one place. A handful are bad on purpose, and each is named." \
    luthier data check examples/demo/train.jsonl --model practice
run "2. What exactly is trained? Green (or between guillemets): the answers and the token that ends them, nothing else." \
    luthier data show examples/demo/train.jsonl --model practice -n 2
run "3. What can the model do before? 200 orders that no training row holds, answered and compared word for word." \
    luthier evaluate practice --data "$HELDOUT" --wrong 2
run "4. Fine-tune by QLoRA, as a recipe says: the same rows, then the plan, then the training." \
    luthier train recipes/demo-qlora.toml --output-dir "$RUNS"
RUN="$(ls -td "$RUNS"/*/ | head -n 1)"
RUN="${RUN%/}"
run "5. What can it do now? The same 200 orders, before and after." \
    luthier evaluate "$RUN" --data "$HELDOUT" --base-too --at-least 0.9

cat <<STORY

== Done in $SECONDS seconds

What next? (\`. .venv/bin/activate\` puts \`luthier\` on your path)
  luthier rows $RUN --step 1
      which rows the first step trained: every step can name its rows
  luthier prove resume recipes/demo-qlora.toml
      stopped and resumed equals never stopped, shown on this recipe
  luthier recipes copy demo-qlora .
      a copy of the recipe to make your own: change model.base and data.train
  docs/tour.md
      the same way again, with every step explained
STORY
