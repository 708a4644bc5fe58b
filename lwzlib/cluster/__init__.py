"""The papermill engine `slurm`, from `papermill NOTEBOOK OUTPUT --engine slurm` to a rank that trains:

    papermill, on a login node   engine.SlurmEngine checks, submits one job (submitit writes the script), and follows it
    sbatch, on the first node    the script ends with `exec python -m lwzlib.cluster.in_job`
    in_job.Head                  runs the notebook in a kernel; live.ipynb and state.json tell how far it is
    a cell                       pipeline.launch.launch starts a stage
    srun or torchrun             starts `lwz stage` as a rank on each GPU, for a stage that trains; others are one process

Before the time limit a signal runs down the same way, and the job goes back into the queue:

    Slurm -USR2-> in_job -INT-> kernel: KeyboardInterrupt in launch -USR1-> each rank: base.processes.Stop is asked,
    base.trainers.Rows saves a checkpoint after the step and stops -> the cell ends, interrupted -> in_job: scontrol requeue

papermill loads this module whenever it is imported, so nothing else is imported before `slurm` is used.
"""


class _Later:
    """Hands every attribute on to `lwzlib.cluster.engine.SlurmEngine`, which is imported with the first."""

    def __getattr__(self, name):
        from lwzlib.cluster.engine import SlurmEngine

        return getattr(SlurmEngine, name)


slurm = _Later()
