#!/usr/bin/env bash
# The main job on the practice model and the demo data, offline: what `make demo` runs.
# It ends with what the last command says: the verdict, the certificate, and where the report is.
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
run "5. Is it better, and what did that cost? Base and tuned on the same 200 orders, each difference with its interval." \
    luthier compare "$RUN" --data "$HELDOUT" -n 200 --temperature 0
python3 - "$RUN/comparison.json" <<'CHECK'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    right = json.load(file)["metrics"]["exact match"]["tuned"]
sys.exit("the demo did not learn its task" if right < 0.9 else 0)
CHECK

cat <<STORY

== And then? (\`. .venv/bin/activate\` puts \`luthier\` on your path)

  luthier chat $RUN --compare
      talk with both models, side by side
  luthier merge $RUN
      one model of base and adapter, certified; \`luthier export\` writes it for Ollama, llama.cpp or MLX
  luthier rows $RUN --step 1
      which rows the first step trained: every step can name its rows
  luthier prove resume recipes/demo-qlora.toml
      stopped and resumed equals never stopped, shown on this recipe
  luthier recipes copy demo-qlora .
      a copy of the recipe to make your own: change model.base and data.train
  docs/tour.md
      the same way again, with every step explained
STORY
run "6. What came of it, after $SECONDS seconds? The report says the same, with curves and answers side by side." \
    luthier report "$RUN"
