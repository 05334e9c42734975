#!/usr/bin/env bash
# The Crafter example through a server of our own: what `make crafter-server` runs. It ends with the `ft:` ids that play.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${OUT:-build/crafter-server}"
ROWS="${ROWS:-build/crafter}"          # where train.jsonl and valid.jsonl lie, or shall
PYTHON="${PYTHON:-python}"
PLAYED="${PLAYED:-10}"                 # held-out games that each agent plays
LENGTH="${LENGTH:-200}"                # steps of a game
MORE="${MORE:-}"                       # more flags for the trainings, such as --steps 20
export LUTHIER_HOME="${LUTHIER_HOME:-$OUT/home}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
SECONDS=0
mkdir -p "$OUT"

run() {
    printf '\n== %s\n\n$ %s\n' "$1" "${*:2}"
    "${@:2}"
}

ask() {                                # a key of a JSON object on standard input
    "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

train() {                              # a recipe, and the file that its `ft:` id goes to
    # shellcheck disable=SC2086
    luthier train "$1" --server "$SERVER" --data "$ROWS/train.jsonl" --set data.valid="$ROWS/valid.jsonl" \
        --output-dir "$OUT/runs" --set output.model_id_file="$2" --poll-seconds 1 $MORE
}

[[ -f "$ROWS/train.jsonl" ]] || run "0. Rows, from the expert's games." \
    "$PYTHON" examples/crafter/make_dataset.py --out "$ROWS"

printf '\n== 1. A server, with two workers, and a key for it.\n\n$ luthier serve --home %s --workers 2\n' "$OUT/server"
LUTHIER_API_KEY="$(luthier keys create --home "$OUT/server" --name crafter --json | ask key)"
export LUTHIER_API_KEY
exec 3< <(exec luthier serve --home "$OUT/server" --port 0 --workers 2 --json 2>"$OUT/server.log")
SERVING=$!
trap 'kill "$SERVING" 2>/dev/null || true; wait "$SERVING" 2>/dev/null || true' EXIT
TOLD=""
while [[ "$TOLD" != *"}" ]] && read -r line <&3; do TOLD+="$line"; done
[[ -n "$TOLD" ]] || { cat "$OUT/server.log" >&2; exit 1; }
SERVER="$(ask address <<<"$TOLD")"

printf '\n== 2. Two jobs, side by side: every weight (it tells in %s), and adapters in 4 bits.\n\n' "$OUT/fft.log"
printf '$ luthier train examples/crafter/crafter_%s.toml --server %s\n' fft "$SERVER" qlora "$SERVER"
train examples/crafter/crafter_fft.toml "$OUT/fft.id" >"$OUT/fft.log" 2>&1 &
FULL=$!
train examples/crafter/crafter_qlora.toml "$OUT/qlora.id"
wait "$FULL" || { cat "$OUT/fft.log" >&2; exit 1; }
FFT="$(cat "$OUT/fft.id")"
QLORA="$(cat "$OUT/qlora.id")"

run "3. The server answers for the base and for both results, and they play." \
    "$PYTHON" examples/crafter/play.py practice random "$FFT" "$QLORA" --endpoint "$SERVER/v1" \
    --games "$PLAYED" --length "$LENGTH" --processes 2 --out "$OUT/played.json"

sed "s|^model = .*|model = \"$QLORA\"|; s|^games = .*|games = $PLAYED|; s|^length = .*|length = $LENGTH|" \
    examples/crafter/evaluation.toml >"$OUT/evaluation.toml"
run "4. The same result, which was brought here, plays here: an evaluation TOML with model = \"$QLORA\"." \
    "$PYTHON" examples/crafter/play.py --config "$OUT/evaluation.toml"

{
    printf '[model]\nsource = "%s"\n\n' "$QLORA"
    printf '[job]\ndata = "%s"\n\n' "$ROWS/train.jsonl"
    printf '[training]\nuse_qlora = true\n\n[hyperparameters]\nlearning_rate = 1e-4\n'
} >"$OUT/next.toml"
run "5. The next run starts from it: a Synth job with [model].source = \"$QLORA\"." \
    luthier train "$OUT/next.toml" --server "$SERVER" --steps 5 --output-dir "$OUT/runs" --poll-seconds 1

printf '\n== Done in %s seconds\n\n  %s\n  %s\n' "$SECONDS" "$FFT" "$QLORA"
printf '      what play.py takes, here or with --endpoint; the server keeps them in %s\n' "$OUT/server"
