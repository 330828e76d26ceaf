#!/usr/bin/env bash
# Measures speed and exactness on a GPU, in less than nine minutes, with random weights and random text:
#   bench/gpu.sh --output gpu.json
#   bench/gpu.sh --size toy --output toy.json     the same code on a CPU, in two minutes
# It needs a checkout, torch, transformers, accelerate, pyarrow and pydantic. See docs/PERFORMANCE.md.
set -euo pipefail
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# otherwise glibc hands large buffers back to the kernel at each step
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
