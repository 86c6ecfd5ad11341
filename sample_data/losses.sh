#!/bin/sh
# One cache, ten losses: trains the embedded tiny model with each and prints one table. Some minutes on two cores.
# Accuracy and margin are of the rewards, which are what a loss ranks by; so that losses can be compared, the same of the
# summed log-ratios is shown beside it. The reference runs twice in all: once over the training pairs, once over the held-out.
set -eu
cd "$(dirname "$0")/.."
out=demo-losses
rm -rf "$out"

model=sample_data/tiny-model
dpocli precompute --model "$model" --data sample_data/train.jsonl --out "$out/ref"
dpocli precompute --model "$model" --data sample_data/heldout.jsonl --out "$out/ref-heldout"

train() { # train NAME OPTIONS...
    name=$1
    shift
    echo "== $name: $*" >&2
    dpocli train --model "$model" --reference "$out/ref" --eval-reference "$out/ref-heldout" --out "$out/$name" \
        --learning-rate 5e-4 --batch-size 32 --epochs 2 --eval-every 100 "$@" > "$out/$name.txt" 2>&1 \
        || { cat "$out/$name.txt"; exit 1; }
}

train dpo --loss dpo
train ipo --loss ipo
train hinge --loss hinge
train robust --loss robust --beta 0.1
train dpop --loss dpop --dpop-lambda 5
train aot --loss aot
train bco --loss bco_pair --beta 0.1
train simpo --loss simpo
train orpo --loss orpo
train mpo --loss mpo

python - "$out" dpo ipo hinge robust dpop aot bco simpo orpo mpo <<'PYTHON'
import json, sys
out, *names = sys.argv[1:]
print(f"\n{'loss':<8}{'held-out accuracy':>18}{'margin':>10}{'log-ratio accuracy':>21}{'margin (nats)':>15}")
for name in names:
    metrics = json.load(open(f"{out}/{name}/summary.json"))["metrics"]
    accuracy, margin, plain_accuracy, plain_margin = (
        metrics[f"eval/{kind}/{what}"] for kind in ("rewards", "logratios") for what in ("accuracies", "margins")
    )
    print(f"{name:<8}{accuracy:>18.1%}{margin:>10.3f}{plain_accuracy:>21.1%}{plain_margin:>15.2f}")
PYTHON
