#!/usr/bin/env bash
# A generative reward model on the practice model, offline: from raw rows to a certified merged model.
#
#   examples/genrm/run.sh [torch|mlx] [FOLDER] [more flags of `luthier train`, such as --steps 60]
set -euo pipefail
ENGINE="${1:-torch}"
EXAMPLE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
FOLDER="${2:-$EXAMPLE/../../build/genrm-$ENGINE}"
mkdir -p "$FOLDER"
cd "$FOLDER"
export LUTHIER_HOME="${LUTHIER_HOME:-$PWD/home}"
SFT=data/processed/sft
cp "$EXAMPLE/template.txt" .
AS_JUDGED=(--template template.txt --reply '{critique}\ngrade: {score}')
SECONDS=0

# Arguments that a shell would take apart are shown in quotes, so that every line can be repeated by hand.
show() {
    printf '\n$'
    local each
    for each in "$@"; do
        if [[ "$each" == *[[:space:]{}]* ]]; then printf " '%s'" "$each"; else printf ' %s' "$each"; fi
    done
    printf '\n'
}

run() {
    if [[ -n "$1" ]]; then printf '\n== %s\n' "$1"; fi
    show "${@:2}"
    "${@:2}"
}

printf 'The job: a small model shall judge answers. Everything lies in %s\n' "$PWD"
run "1. Raw rows: answers with a critique and a score, and pairs in which one answer is the better one." \
    "${PYTHON:-python}" "$EXAMPLE/make_data.py" --out data/raw
# Four rows of scored.jsonl are faulty on purpose; the command names them, and goes on since they are few.
run "2. Each scored answer becomes a conversation of a judge. Every row is in exactly one place." \
    luthier data judge data/raw/scored.jsonl -o $SFT/sft_genrm_train.jsonl "${AS_JUDGED[@]}"
run "3. Train and held out; both answers to a prompt stay on one side, and what is too long is dropped." \
    luthier data split $SFT/sft_genrm_train.jsonl --valid 500 --max-length 2048 --model practice \
    --group-by prompt_id --train-out $SFT/sft_train.jsonl --valid-out $SFT/sft_valid.jsonl
run "4. What exactly is trained: the judgement and the token that ends it." \
    luthier data show $SFT/sft_train.jsonl --model practice -n 1
rm -f genrm-practice.toml
luthier recipes copy genrm-practice . >/dev/null
run "5. Train by the recipe on the engine \`$ENGINE\`. Perplexity falls; the adapter is merged and certified at the end." \
    luthier train genrm-practice.toml --engine "$ENGINE" --output-dir runs "${@:3}"
RUN="$(ls -td runs/*/ | head -n 1)"
RUN="${RUN%/}"
run "6. Is it a judge? Scores against the right ones, and pairs of answers, beside the base." \
    luthier compare "$RUN" -n 250 --temperature 0
run "7. Pairs that it never saw: does it score the better answer higher?" \
    luthier data judge data/raw/pairs.jsonl -o data/processed/pairs.jsonl "${AS_JUDGED[@]}"
run "" luthier evaluate "$RUN" --data data/processed/pairs.jsonl --base-too --wrong 0
run "8. The merged model is what was trained: certified again, from what lies on disk." \
    luthier verify "$RUN"
run "9. It is the reference point of the next run: DPO on right and wrong judgements starts from it." \
    luthier train --model "$RUN/merged_model" --engine "$ENGINE" --data data/raw/judgements.jsonl --valid 20 \
    --objective dpo --method lora --learning-rate 5e-4 --steps 10 --max-length 128 --output-dir next

cat <<STORY

== Done in $SECONDS seconds

What next?
  $PWD/$RUN/finetune_report.html
      the report: verdict first, then curves, rows and what to do next
  luthier recipes copy genrm-gemma-2b-mlx .     (or genrm-gemma-2b for a GPU)
      the same with Gemma 2B and your own rows
  docs/guides/genrm.md
      the same way again, with every step explained
STORY
