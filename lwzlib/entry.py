"""What papermill loads whenever it is imported: nothing. The engine `slurm` itself comes when it is asked for."""


class Later:
    """Hands every attribute on to `lwzlib.slurm.SlurmEngine`, which is imported at the first."""

    def __getattr__(self, name):
        from lwzlib.slurm import SlurmEngine

        return getattr(SlurmEngine, name)


engine = Later()
