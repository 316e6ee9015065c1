# Sourced by the batch scripts: how many processes a job has, one for each of its GPUs, or for each node where it asks for
# no GPU; and how they are started. What a site changes is in env.sh.

source "${BASH_SOURCE[0]%/*}/env.sh" || return

export RANKS_PER_NODE=${SLURM_GPUS_ON_NODE:-1}
# The first node by its name: what every node can reach. A port that another job on that node will hardly have.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# An element of an array by its own name: the SLURM_JOB_ID of one of them is that of the whole array.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

say() { echo "$(date +%FT%T) job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# When one process has ended, the others get two minutes: they may wait for it for ever. It is not --kill-on-bad-exit,
# since srun's exit code is the highest of all: that of the processes it killed would hide why the first one ended.
export SLURM_WAIT=${SLURM_WAIT:-120}

on_every_gpu() { # COMMAND...
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$RANKS_PER_NODE" \
    ${SLURM_CPUS_PER_GPU:+--cpus-per-task="$SLURM_CPUS_PER_GPU"} "$@"
}
on_every_node() { srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@"; }
