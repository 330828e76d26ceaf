#!/usr/bin/env bash
# The study of docs/STUDY.md, step by step. Finished steps and runs are skipped, so the same command goes on after an
# interruption. TEXT and HELDOUT are files of text (a column or key `text`); DATA has glue/ and blimp/ (docs/glue.md).
#   TEXT=train.jsonl HELDOUT=heldout.jsonl DATA=data bench/study.sh
# The defaults are those of the plan. On a GPU, set WORKERS=--backend=ray JOBS=1. The other variables make a toy study.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEXT:?}" "${HELDOUT:?}" "${DATA:?}"
out=${OUT:-runs/study} trunks=${TRUNKS:-3} jobs=${JOBS:-2} workers=${WORKERS:---backend=local}
reference=${REFERENCE:-small} student=${STUDENT:-mini} vocabulary=${VOCABULARY:-8192} train_rows=${TRAIN_ROWS:-10000}
batch=${BATCH:-64} reference_steps=${REFERENCE_STEPS:-10980} trunk_steps=${TRUNK_STEPS:-1098} branch_steps=${BRANCH_STEPS:-2562}
poor_documents=${POOR_DOCUMENTS:-399} poor_reference_steps=${POOR_REFERENCE_STEPS:-1221} poor_steps=${POOR_STEPS:-2442}
# the rows of the front table, which are fine-tuned, and the others
front=${FRONT:-random-r30,random-r30-long,random-r30-again,random-r30+kd,study-parquet,study-parquet+kd,study-self,study-self+kd}
rows=${ROWS:-predict-excess,parquet-paper,self-paper,study-parquet-shuffled}
export TOKENIZERS_PARALLELISM=false MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824

tokens() { python pipeline/score.py --teacher none --tokenizer "$out/tokenizer" --backend local "$@"; }
reference() {  # in directory $1, train a reference on the tokens for $2 steps, and score them and the held-out text
    python train/run.py --shards "$1/tokens" --eval-shards "$out/heldout-tokens" --entropy-source random --model "$reference" \
        --per-device-train-batch-size "$batch" --max-steps "$2" --eval-strategy no --seed 1 --output-dir "$1/reference"
    python pipeline/score.py --corpus "$1/tokens" --teacher "$1/reference" "$workers" --output "$1/scored-tokens"
    python pipeline/score.py --corpus "$out/heldout-tokens" --teacher "$1/reference" "$workers" --output "$1/scored-heldout-tokens"
}
screen() {  # in directory $1, with the flags $2, $3, …
    python bench/screen.py --shards "$1/scored-tokens" --trunk-shards "$1/tokens" --student "$student" \
        --eval-shards "$1/scored-heldout-tokens" --batch "$batch" --trunk-steps "$trunk_steps" --trunk-mask-ratio 0.3 \
        --branch-steps "$branch_steps" --scratch-steps "$poor_steps" --jobs "$jobs" --blimp "$DATA" --output "$1/screen" \
        "${@:2}"
}

python pipeline/tokenizer.py --corpus "$TEXT" --vocab-size "$vocabulary" --lowercase --strip-accents --output "$out/tokenizer"
tokens --corpus "$TEXT" --output "$out/tokens"
tokens --corpus "$HELDOUT" --output "$out/heldout-tokens"
reference "$out" "$reference_steps"
for trunk in $(seq "$trunks"); do
    screen "$out" --rows "$front" --trunks "$trunk"
    python train/run.py --shards "$out/scored-tokens" --eval-shards "$out/scored-heldout-tokens" --entropy-source random \
        --model "$student" --max-steps 1 --learning-rate 0 --muon-learning-rate 0 --eval-strategy no --seed "$trunk" \
        --output-dir "$out/screen/branches-$trunk/untrained"
    models=()
    for row in untrained ${front//,/ }; do models+=("$out/screen/branches-$trunk/$row"); done
    python glue/run.py --model "${models[@]}" --data "$DATA/glue" --tasks sst2,qqp,mnli_matched,qnli --seeds 1,2,3 \
        --learning-rate 1e-3 --epochs 3 --batch-size 32 --limit-train "$train_rows" --num-workers "$jobs" \
        --output "$out/glue-$trunk"
done
screen "$out" --rows "$front,$rows" --trunks "$trunks"
# the corner with little text
tokens --corpus "$TEXT" --limit-documents "$poor_documents" --output "$out/poor/tokens"
reference "$out/poor" "$poor_reference_steps"
screen "$out/poor" --rows scratch-parquet,scratch-self,scratch-parquet+kd --trunks "$trunks"
