#!/usr/bin/env bash
# Untried. Scores a corpus on the nodes of a Slurm allocation: sbatch docs/slurm.sh, from the project's directory, whose
# .venv all nodes see. Submit it again after a time limit: it finishes what is missing.
#SBATCH --job-name=score
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail
source .venv/bin/activate
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(ray get-auth-token --generate)
port=6379
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address "$address" --port "$port" --block &
timeout 300 bash -c "until ray status --address $address:$port; do sleep 2; done" &> /dev/null ||
    { echo "Ray did not start on $head in 5 minutes" >&2; exit 1; }
if (( SLURM_JOB_NUM_NODES > 1 )); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --overlap \
        ray start --address "$address:$port" --block &
fi

RAY_ADDRESS="$address:$port" python pipeline/score.py \
    --corpus "${CORPUS:?a path that all nodes see, or a URI}" --teacher "${TEACHER:?}" --output "${OUTPUT:?}" &
score=$!
trap 'kill -TERM $score; wait $score' TERM
wait $score
