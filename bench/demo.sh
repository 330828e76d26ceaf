#!/usr/bin/env bash
# The whole story in one run, small: `make demo`. A corpus that is on every machine → a reference → its entropies → four
# students → how much more they know than an untrained model. Finished steps are skipped, so the same command
# continues an interrupted run.
# Sizes by environment: DOCUMENTS=20000 STEPS=2000 PAIRS=200 OUT=runs/larger make demo
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/demo}
documents=${DOCUMENTS:-2500} steps=${STEPS:-200} pairs=${PAIRS:-200}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# otherwise glibc hands large buffers back to the kernel at each step; to keep them doubles the speed of the MLM head
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
step() { printf '\n=== %s (%d s so far)\n' "$*" "$SECONDS"; }

corpus=(--corpus docstrings --limit-documents "$documents")
train() { python train/run.py --model tiny --eval-fraction 0.05 --seed 1 "$@"; }

step "1/6 a WordPiece tokenizer, trained on the docstrings of the installed packages"
python pipeline/tokenizer.py "${corpus[@]}" --vocab-size 4096 --lowercase --output "$out/tokenizer"

step "2/6 the corpus as token shards"
python pipeline/score.py "${corpus[@]}" --teacher none --tokenizer "$out/tokenizer" --shard-tokens 32768 \
    --backend local --output "$out/tokens"

step "3/6 a reference model, trained with random masking"
train --shards "$out/tokens" --entropy-source random --output-dir "$out/reference" --max-steps $((steps * 3 / 2))

step "4/6 the reference scores the corpus: predictive entropies and top-k log-probabilities"
python pipeline/score.py --corpus "$out/tokens" --teacher "$out/reference" --output "$out/scored" \
    --backend local --cpus-per-worker 1
python train/explore.py "$out/scored" --output "$out/entropy.html"

step "5/6 an untrained student, and students at equal steps: random, parquet, parquet + distillation, self"
student() { train --shards "$out/scored" --output-dir "$out/$1" --max-steps "$steps" "${@:2}"; }
student untrained --entropy-source random --max-steps 1 --learning-rate 0 --muon-learning-rate 0
student random --entropy-source random
student parquet --entropy-source parquet
student parquet-kd --entropy-source parquet --distill-weight 0.5
student self --entropy-source self

step "6/6 which sentence of a pair is correct? Pairs are made from held-out docstrings; nothing is fine-tuned"
python glue/run.py --model "$out"/{untrained,random,parquet,parquet-kd,self} --tasks pairs \
    --limit-pairs "$pairs" --output "$out/pairs"
step "the comparison"
python glue/compare.py "untrained=$out/pairs/untrained" "random=$out/pairs/random" "parquet=$out/pairs/parquet" \
    "parquet+kd=$out/pairs/parquet-kd" "self=$out/pairs/self" --baseline random --output "$out/comparison"

cat <<EOF

Done in $SECONDS s. What was produced, under $out/:
  scored/                 shards of tokens, entropies and top-k log-probabilities (try polars.read_parquet)
  entropy.html            text coloured by entropy, with the masks: open it in a browser
  random/ parquet/ …      the students; each loads with AutoModelForMaskedLM and has a summary.json
  comparison/             page.html, table.md, table.json and table.csv: the students side by side
A run this small shows the machinery. It proves nothing about quality.
EOF
