"""What slurm/train.sbatch makes of the ends that a training can come to; an array, so that all come to theirs at once.

In place of `ipa` stands a program that ends as told: what is tried here is the script, and Slurm.
"""

import pytest

# What every start of an element ends with; "+" in front of it: after it wrote a checkpoint.
ENDS = {
    "done": ["0"],
    "mistake": ["2"],
    "stopped_twice": ["75", "75", "0"],
    "told_too_early": ["138", "0"],
    "crashes": ["143", "1", "0"],
    "crashes_with_progress": ["1", "+137", "1", "0"],
    "taken_over": ["76"],
    "unknown_run": ["where"],
}
EXPECTED = {  # state, number of restarts, exit code
    "done": ("COMPLETED", 0, "0:0"),
    "mistake": ("FAILED", 0, "2:0"),
    "stopped_twice": ("COMPLETED", 2, "0:0"),
    "told_too_early": ("COMPLETED", 1, "0:0"),
    "crashes": ("FAILED", 1, "1:0"),
    "crashes_with_progress": ("COMPLETED", 3, "0:0"),
    "taken_over": ("FAILED", 0, "76:0"),
    "unknown_run": ("FAILED", 0, "2:0"),
}
PROGRAM = """#!/bin/bash
ends=({ends})
now=(${{ends[SLURM_ARRAY_TASK_ID]//,/ }})
now=${{now[${{SLURM_RESTART_COUNT:-0}}]}}
run=runs/$SLURM_ARRAY_TASK_ID
if [ "$1" = where ]; then echo "$run"; [ "$now" != where ]; exit $(($? * 2)); fi
[[ "$*" == *"trainer.num_nodes=1 trainer.devices=1" ]] || exit 3
if [[ $now == +* ]]; then mkdir -p "$run/checkpoints/step-$SLURM_RESTART_COUNT"; fi
exit "${{now#+}}"
"""


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exit_codes")
    program = folder / "bin" / "ipa"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(ends=" ".join(map(",".join, ENDS.values()))))
    program.chmod(0o755)
    array = cluster.submit(
        "train.sbatch",
        "run.name=x",
        folder=folder,
        environment={"PATH": f"{program.parent}:{cluster.environment['PATH']}", "MAX_CRASHES": "1"},
        array=f"0-{len(ENDS) - 1}",
        gpus_per_node=1,
        cpus_per_gpu=1,
    )
    return {name: array.element(i) for i, name in enumerate(ENDS)}


@pytest.mark.parametrize("name", ENDS)
def test_a_job_comes_back_while_that_helps(jobs, name):
    job = jobs[name]
    state, restarts, exit_code = EXPECTED[name]
    job.wait(state)
    assert (job.num_restarts, job.shown("ExitCode")) == (restarts, exit_code)


def test_the_log_says_why(jobs):
    jobs["crashes"].wait("FAILED")
    assert "giving up, as 2 starts in a row crashed without a new checkpoint" in jobs["crashes"].log
    jobs["stopped_twice"].wait("COMPLETED")
    assert jobs["stopped_twice"].log.count("stopped when told, with a checkpoint. Back to the queue.") == 2
    assert not list(jobs["done"].folder.glob(".ipa-train-*"))
