"""What papermill loads whenever it is imported: nothing. The engine `slurm` itself comes when it is asked for."""


class _Later:
    """Hands every attribute on to `lwzlib.cluster.engine.SlurmEngine`, which is imported at the first."""

    def __getattr__(self, name):
        from lwzlib.cluster.engine import SlurmEngine

        return getattr(SlurmEngine, name)


slurm = _Later()
