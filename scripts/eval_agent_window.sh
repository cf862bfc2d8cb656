#!/usr/bin/env bash
# The memory agent against the same model that reads the last window only: single needles, the same
# questions for both, greedy. At 4K the window holds everything: what the model can do at best.
# Writes OUT/comparison-*/comparison.md and .png.
#
#   MODEL=folder scripts/eval_agent_window.sh OUT
#
# MODEL      a transformers model folder; default SmolLM2-135M-Instruct as `qwenlong demo` makes it
# BASE_URL   a server to ask instead of an embedded engine; MODEL stays the tokenizer's folder and
#            NAME is the model's name there
# SETS       length:questions, by default "4K:100 128K:100 1M:20"
# WINDOW     the model's context (8192); CHUNK what the agent reads of it at a time
# READING    of the agent: quotes (sentences that the model copies, for a model of this size), or
#            rewrite (the paper's memory and plan)
# DEVICE, DTYPE, CONCURRENCY   of the embedded engine
#
# Killed at any moment, the same command goes on. On one GPU the agent takes a few minutes for
# 128K:100 and about ten for 1M:20, since the 160 chunks of a question follow one another.
set -euo pipefail

OUT=${1:?usage: scripts/eval_agent_window.sh OUT}
PYTHON=${PYTHON:-.venv/bin/python}
SETS=${SETS:-4K:100 128K:100 1M:20}
WINDOW=${WINDOW:-8192}
CHUNK=${CHUNK:-6400}
READING=${READING:-quotes}
MEMORY=${MEMORY:-512}
PLAN=${PLAN:-16}
QUOTE=${QUOTE:-32}
ANSWER=${ANSWER:-48}
CONCURRENCY=${CONCURRENCY:-64}

qwenlong() { "$PYTHON" -m qwenlong.cli "$@"; }

if [ -z "${MODEL:-}" ]; then
  MODEL=$("$PYTHON" -c 'from qwenlong.models import demo_model; print(demo_model())')
fi
asked=(--model "$MODEL")
if [ -n "${BASE_URL:-}" ]; then
  asked=(--model "${NAME:?NAME is the name of the model at BASE_URL}" --base-url "$BASE_URL")
fi
common=(
  "${asked[@]}" --tokenizer "$MODEL" --max-tokens "$ANSWER" --temperature 0 --top-p 1
  --concurrency "$CONCURRENCY" --device "${DEVICE:-auto}" --dtype "${DTYPE:-auto}"
)

for set in $SETS; do
  length=${set%%:*} count=${set##*:}
  data=$OUT/data-$length
  if [ ! -f "$data/summary.json" ]; then
    qwenlong eval make --out "$data" --tasks needle_single --lengths "$length" --count "$count" \
      --tokenizer "$MODEL" --seed 0
  fi
  qwenlong eval run "$data" --out "$OUT/last-window-$length" "${common[@]}" \
    --mode full --window "$WINDOW" --keep last
  qwenlong eval run "$data" --out "$OUT/agent-$length" "${common[@]}" \
    --mode agent --reading "$READING" --quote-tokens "$QUOTE" \
    --chunk-tokens "$CHUNK" --memory-tokens "$MEMORY" --plan-tokens "$PLAN" \
    --repairs 0 --fallback take
  qwenlong eval compare "$OUT/agent-$length" "$OUT/last-window-$length" \
    --out "$OUT/comparison-$length"
done
