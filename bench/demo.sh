#!/usr/bin/env bash
# The whole story in one run, small: `make demo`. Every step is skipped when it is done, so a broken run goes on.
# A corpus that is on every machine → a reference model → its entropies → four students → what they learned.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/demo
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# glibc hands large buffers back to the kernel each step otherwise; keeping them doubles the speed of the MLM head
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
step() { printf '\n=== %s (%d s so far)\n' "$*" "$SECONDS"; }

corpus=(--corpus docstrings --limit-documents 6000)
train=(--model tiny --eval-fraction 0.05 --mask-ratio 0.15 --max-steps 250 --seed 1)

step "1/6 a WordPiece tokenizer, trained on the docstrings of the installed packages"
python pipeline/tokenizer.py "${corpus[@]}" --vocab-size 8192 --output $out/tokenizer

step "2/6 the corpus as token shards"
python pipeline/score.py "${corpus[@]}" --teacher none --tokenizer $out/tokenizer --shard-tokens 65536 \
    --backend local --output $out/tokens

step "3/6 a reference model, trained with random masking"
python train/run.py --shards $out/tokens --entropy-source random --output-dir $out/reference "${train[@]}"

step "4/6 Ray scores the corpus with it: predictive entropies and top-k log-probabilities"
python pipeline/score.py --corpus $out/tokens --teacher $out/reference --output $out/scored

step "5/6 students at equal steps: random, parquet, parquet + distillation, self"
python train/run.py --shards $out/scored --entropy-source random --output-dir $out/random "${train[@]}"
python train/run.py --shards $out/scored --entropy-source parquet --output-dir $out/parquet "${train[@]}"
python train/run.py --shards $out/scored --entropy-source parquet --distill-weight 0.5 --output-dir $out/parquet-kd "${train[@]}"
python train/run.py --shards $out/scored --entropy-source self --output-dir $out/self "${train[@]}"

step "6/6 fine-tuning on two probe tasks made from held-out docstrings"
for name in random parquet parquet-kd self; do
    python glue/run.py --model $out/$name --tasks probes --seeds 1,2 --protocol cramming --output $out/probes/$name
done
python glue/compare.py random=$out/probes/random parquet=$out/probes/parquet parquet+kd=$out/probes/parquet-kd \
    self=$out/probes/self --output $out/comparison

cat <<EOF

Done in $SECONDS s. What was produced, under $out/:
  scored/                 shards of tokens, entropies and top-k log-probabilities (try: polars.read_parquet)
  random/ parquet/ …      students; each loads with AutoModelForMaskedLM and has a summary.json
  comparison/             table.md, table.json and chart.png: the students side by side
A run this small shows the machinery. It proves nothing about quality.
EOF
