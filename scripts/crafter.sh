#!/usr/bin/env bash
# The whole way of the Crafter example on the practice model, offline: what `make crafter` runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LUTHIER_HOME="${LUTHIER_HOME:-build/crafter/home}"
PYTHON="${PYTHON:-python}"
PLAYED="${PLAYED:-40}"        # held-out games that each agent plays
# A model this small is no faster with two threads, so two processes get one each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
OUT=build/crafter
SECONDS=0

run() {
    printf '\n== %s\n\n$ %s\n' "$1" "${*:2}"
    "${@:2}"
}

cat <<'STORY'
The job: a small model shall learn to play Crafter from what a scripted expert saw and did, and the game says whether it did.
STORY
run "1. The expert plays; what it saw and did becomes rows. No game is on both sides." \
    "$PYTHON" examples/crafter/make_dataset.py --out "$OUT"
run "2. What exactly is trained? The action, and the token that ends the turn." \
    luthier data show "$OUT/train.jsonl" --model practice -n 2
printf '\n== 3. Train every weight, on one core; it tells in %s.\n\n$ luthier train examples/crafter/crafter_fft.toml &\n' \
    "$OUT/fft.log"
luthier train examples/crafter/crafter_fft.toml --output-dir "$OUT/runs" --set output.model_id_file="$OUT/fft.id" \
    >"$OUT/fft.log" 2>&1 &
FULL=$!
trap 'kill "$FULL" 2>/dev/null || true' EXIT
run "4. Beside it, on the other core, adapters over the same model in 4 bits." \
    luthier train examples/crafter/crafter_qlora.toml --output-dir "$OUT/runs" --set output.model_id_file="$OUT/qlora.id"
wait "$FULL" || { cat "$OUT/fft.log" >&2; exit 1; }
printf '\n== How the training of every weight ended.\n\n'
tail -n 8 "$OUT/fft.log"
FFT="$(cat "$OUT/fft.id")"
QLORA="$(cat "$OUT/qlora.id")"
run "5. Play games that no row comes from: base, dice, expert, and both results." \
    "$PYTHON" examples/crafter/play.py practice random expert "$FFT" "$QLORA" \
    --games "$PLAYED" --processes 2 --at-least 4 --pictures "$OUT" --out "$OUT/played.json"

cat <<STORY

== Done in $SECONDS seconds

What next?
  $OUT/game.gif
      the best game of the last agent
  $PYTHON examples/crafter/play.py practice $QLORA --games 50
      more games, narrower intervals
  luthier report "$OUT"/runs/*
      both runs side by side
  luthier train examples/crafter/crafter_qlora.toml --model $FFT
      go on from a result; [model].source = "ft:<id>" in a Synth job does the same
  docs/guides/crafter.md
      the story, what failed on the way, and what a larger model would change
STORY
