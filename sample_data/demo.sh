#!/bin/sh
# The three commands on the sample data with the embedded tiny model: `make demo` runs this.
set -eu
cd "$(dirname "$0")/.."
out=demo-run
rm -rf "$out"

run() { printf '\n$ %s\n' "$*"; "$@"; }

echo "== 1. The frozen reference scores every pair, once: training pairs, then held-out pairs."
run dpocli precompute --model sample_data/tiny-model --data sample_data/train.jsonl --out "$out/ref"
run dpocli precompute --model sample_data/tiny-model --data sample_data/heldout.jsonl --out "$out/ref-heldout"

echo; echo "== 2. The untrained model on the held-out pairs: it is the reference, so every pair is a tie."
run dpocli evaluate --model sample_data/tiny-model --reference "$out/ref-heldout" --out "$out/report-before" --loss dpo

echo; echo "== 3. Training reads the cached values; the reference is never run again."
run dpocli train --model sample_data/tiny-model --reference "$out/ref" --eval-reference "$out/ref-heldout" \
    --out "$out/run" --loss dpo --beta 0.1 --learning-rate 5e-4 --batch-size 32 --epochs 3

echo; echo "== 4. The trained model on the held-out pairs."
run dpocli evaluate --model "$out/run/model" --reference "$out/ref-heldout" --out "$out/report-after"

python - "$out" <<'PYTHON'
import json, sys
before, after = (json.load(open(f"{sys.argv[1]}/report-{when}/metrics.json")) for when in ("before", "after"))
print(f"\nHeld-out reward accuracy: untrained {before['rewards/accuracies']:.1%} "
      f"(ties {before['rewards/ties']:.0%}), trained {after['rewards/accuracies']:.1%}")
print(f"Look at {sys.argv[1]}/run/curves.png, {sys.argv[1]}/run/metrics.jsonl and {sys.argv[1]}/report-after/pairs.parquet.")
PYTHON
