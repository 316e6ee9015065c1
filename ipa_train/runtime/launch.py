"""What the launcher of this process says of it. Known before torch is imported."""

import os

# In the order in which launchers set them: torchrun, Lightning's own launcher, srun.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def launched_rank() -> int:
    """This process's number among those that were launched together."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
