"""What papermill loads whenever it is imported: nothing. The engine `slurm` itself comes when it is asked for."""


class Later:
    def __getattr__(self, name):
        from lwzlib.slurm import SlurmEngine

        return getattr(SlurmEngine, name)


engine = Later()
