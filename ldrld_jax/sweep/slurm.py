"""A sweep as a job array of Slurm."""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from ldrld_jax.errors import UserError
from ldrld_jax.sweep.plan import Job

_GRACE = 120  # seconds before the time limit at which runs save and exit


def script(jobs: Sequence[Job], arguments: Sequence[str], logs: pathlib.Path, at_once: int = 1) -> str:
    """Returns a script for sbatch whose tasks each run one missing job of a sweep.

    Time, partition, GPUs and the like are flags of sbatch. A task that is preempted or requeued resumes its run.

    Args:
      jobs: all jobs of the sweep, with their states.
      arguments: of the sweep's command line, without --launcher.
      logs: the folder of the tasks' output; it must exist when the script is submitted.
      at_once: the largest number of tasks at a time; 1 leaves it to Slurm.

    Raises:
      UserError: if no job is missing.
    """
    missing = [index for index, job in enumerate(jobs) if job.state != "done"]
    if not missing:
        raise UserError("every run of the sweep is complete. Remove --launcher to see their table.")
    array = ",".join(map(str, missing)) + (f"%{at_once}" if at_once > 1 else "")
    command = shlex.join([sys.executable, "-m", "ldrld_jax.sweep", *arguments])
    return f"""#!/bin/bash
#SBATCH --job-name=ldrld_jax-sweep
#SBATCH --array={array}
#SBATCH --output={shlex.quote(str(logs))}/slurm-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@{_GRACE}
cd {shlex.quote(str(pathlib.Path.cwd()))}
exec {command} --shard "$SLURM_ARRAY_TASK_ID/{len(jobs)}"
"""
