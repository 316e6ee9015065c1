# What a site changes: sourced by every batch script of this folder, on the first node of a job, in the folder that the
# job was submitted from. Its exports reach the processes of all nodes.

# module load cuda/12.4
if [ -e .venv/bin/activate ]; then source .venv/bin/activate; fi

# Models and compiled kernels: a disk that all nodes see. Nodes without internet should not try to reach it.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=/shared/inductor

# The network between nodes. If NCCL picks a wrong one, its log says so (NCCL_DEBUG=INFO).
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# A disk of the node's own, for STAGE (see train.sbatch).
export LOCAL_DISK=${LOCAL_DISK:-${TMPDIR:-/tmp}}
