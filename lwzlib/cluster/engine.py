"""The papermill engine `slurm`: a notebook becomes one Slurm job, and the executed notebook comes back while it runs.

    papermill notebooks/05_train_grpo.ipynb out.ipynb -p recipe paper --engine slurm

Checked before anything is submitted: names and types of the parameters, the recipe, the profile, and Slurm's own opinion
(`sbatch --test-only`). Ctrl-C cancels the job. A client that is killed, or loses its terminal, leaves the job running: the
same command finds it again. The paper says nothing of how its jobs were started.
"""

import ast
import hashlib
import json
import os
import time

import click
import nbformat
import papermill
from papermill.engines import Engine
from papermill.log import logger

from lwzlib.base.recipe import Recipe, RecipeError, load_recipe, nearest_name
from lwzlib.base.rows import RunError, locked, write_atomic
from lwzlib.cluster.jobs import End, Job, Watch, ask_slurm, id_of, jobs_of, name_of
from lwzlib.cluster.profile import ClusterError, Profile, batch_script, check_job, load_profile, submit_job
from lwzlib.pipeline.stages import run_folder

_LOOK_S = 0.5
_CANCEL_PATIENCE_S = 60


class Refused(RuntimeError, click.ClickException):
    """Nothing was submitted, for the reason given. The papermill command shows it as one line, without a traceback."""

    def __init__(self, message: str):
        click.ClickException.__init__(self, message)

    __str__ = click.ClickException.__str__


class SlurmEngine(Engine):
    """`profile` is an option of papermill.execute_notebook; on the command line it comes from LWZ_PROFILE."""

    @classmethod
    def execute_notebook(cls, nb, kernel_name, output_path=None, input_path=None, profile=None, start_timeout=60,
                         execution_timeout=None, **options):
        """Raises Refused before anything is submitted or written."""
        try:
            if not output_path or "://" in str(output_path):
                raise ClusterError("the engine slurm writes the notebook while the job runs: give a path on the file system as "
                                   "output, and leave papermill's request_save_on_cell_execute on")
            site = load_profile(profile)
            parameters = checked(nb, site)
            name = name_of(os.path.abspath(output_path))
            (site.jobs_folder / name).mkdir(parents=True, exist_ok=True)
            with locked(site.jobs_folder / name / "lock"):
                asked = {"notebook": str(input_path), "output": os.path.abspath(output_path), "parameters": parameters,
                         "cwd": os.getcwd(), "kernel": kernel_name, "profile": site.model_dump(),
                         "options": {"start_timeout": start_timeout, "execution_timeout": execution_timeout}}
                job = attached(site, name, asked, nb) or submitted(site, name, asked, nb)
                return super().execute_notebook(nb, kernel_name, output_path=output_path, job=job, **options)
        except (ClusterError, RecipeError, RunError) as error:
            raise Refused(str(error)) from None

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, job=None, log_output=False, stdout_file=None, stderr_file=None, **_):
        """papermill calls it with `nb_man`, its notebook: filled from the job until that ends. Ctrl-C cancels the job."""
        mirror = Mirror(nb_man, job, log_output, {"stdout": stdout_file, "stderr": stderr_file})
        watch = Watch(job, mirror.tell)
        try:
            end = _follow(mirror, watch)
        except KeyboardInterrupt:
            mirror.tell(f"job {job.record['job_id']}: cancelling")
            job.cancel()
            _follow(mirror, watch, _CANCEL_PATIENCE_S)
            mirror.fail(End("CANCELLED", "JobCancelled", f"Slurm job {job.record['job_id']} was cancelled by Ctrl-C"))
            raise
        job.note(seen=True)
        if end.name:
            mirror.fail(end)


def parameters_of(nb) -> dict:
    """Names and literal values of the cell tagged `parameters`."""
    cells = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    nodes = ast.parse(cells[0].source).body if cells else []
    assigned = [(node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value)
                for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign)]
    return {ast.unparse(name): _literal(value) for name, value in assigned}


def _literal(node):
    try:
        return ast.literal_eval(node)
    except ValueError:  # computed: its value is the notebook's affair
        return None


def checked(nb, site: Profile) -> dict:
    """The parameters that the notebook will run with. Raises ClusterError or RecipeError for one that cannot be."""
    known, given = parameters_of(nb), nb.metadata.papermill.get("parameters", {})
    for name, value in given.items():
        if name not in known:
            raise ClusterError(f"the notebook has no parameter {name!r} (it has {', '.join(known)})"
                               f"{nearest_name(name, known)}")
        if isinstance(known[name], int | float) and not isinstance(value, int | float):
            raise ClusterError(f"parameter {name} = {value!r} must be a number, such as {known[name]!r}")
    parameters = known | dict(given)
    if "recipe" in parameters:
        loaded = load_recipe(parameters["recipe"], parameters.get("overrides"))
        if parameters.get("run_dir") == "":
            parameters["run_dir"] = str(run_folder(loaded, int(parameters.get("seed") or 0)))
        if "arm" in parameters:
            loaded.for_arm(parameters["arm"])
            _fits(loaded, site)
    return parameters


def _fits(loaded: Recipe, site: Profile) -> None:
    """Raises ClusterError for GRPO that needs more nodes than the job has, or more memory than its GPUs have."""
    if loaded.launch not in ("torchrun", "slurm"):
        return
    from lwzlib.cluster.estimate import GPUS, plan, problems

    for wanted, has, what in ((loaded.distributed.nodes, site.nodes, "nodes"),
                              (loaded.distributed.processes, site.gpus_per_node, "gpus_per_node")):
        if site.gpu and wanted > has:
            raise ClusterError(f"recipe {loaded.name} wants {wanted} {'nodes' if what == 'nodes' else 'processes a node'}, and "
                               f"the profile gives {what}={has}: change either, by overrides or by LWZ_PROFILE")
    if site.gpu and (reasons := problems(plan(loaded, GPUS[site.gpu]))):
        raise ClusterError(f"recipe {loaded.name} cannot run on {site.gpu}: {'; '.join(reasons)} (see `lwz estimate`)")


def _digest(nb, asked: dict) -> str:
    """Of what is computed; the site may change."""
    content = [[cell.source for cell in nb.cells], asked["cwd"], asked["kernel"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def attached(site: Profile, name: str, asked: dict, nb) -> Job | None:
    """The job that makes this output: one that still runs, or one whose result nobody has seen yet."""
    if not (earlier := jobs_of(site.jobs_folder, name)):
        return None
    job = earlier[-1]
    record = job.record
    if record.get("seen"):
        return None
    if not (number := record.get("job_id") or id_of(record["name"])):
        return None  # the client died before it submitted
    job.note(job_id=number)
    seen = ask_slurm(number)
    if seen is None:
        raise ClusterError(f"Slurm does not answer, and its job {number} may still make {asked['output']}")
    end, same = job.end(seen), record["digest"] == _digest(nb, asked)
    if end and not (same and end.state in ("finished", "failed")):
        logger.info(f"{end.message or f'Slurm job {number} {end.state}'}; submitting anew")
        return None
    if not same:
        theirs = [f"{key} was {value!r}, is {asked['parameters'].get(key)!r}" for key, value in record["parameters"].items()
                  if value != asked["parameters"].get(key)] or ["its cells or its working directory differ"]
        raise ClusterError(f"{asked['output']} is being made by Slurm job {number} of another notebook ({'; '.join(theirs)}). "
                           f"Choose another output, or: scancel {number}")
    logger.info(f"Slurm job {number}, submitted {time.ctime(record['submitted'])}, found again")
    return job


def submitted(site: Profile, name: str, asked: dict, nb) -> Job:
    """A new job. Its folder tells the whole story: job.json, input.ipynb, live.ipynb, state.json, its script and its log."""
    earlier = jobs_of(site.jobs_folder, name)
    number = int(earlier[-1].folder.name) + 1 if earlier else 1
    folder, job_name = site.jobs_folder / name / str(number), f"lwz-{name}-{number}"
    check_job(site, folder, job_name)
    folder.mkdir(exist_ok=True)
    nbformat.write(nb, folder / "input.ipynb")
    job, record = Job(folder), asked | {"name": job_name, "digest": _digest(nb, asked), "submitted": time.time()}
    write_atomic(folder / "job.json", json.dumps(record, indent=1))
    job.note(job_id=submit_job(site, folder, job_name))
    logger.info(f"Slurm job {job.record['job_id']}: {folder}")
    return job


def dry_run(notebook, output, parameters: dict, profile: str | None) -> str:
    """The batch script of a job, after all the checks that need no Slurm. Raises ClusterError or RecipeError."""
    nb = papermill.execute_notebook(notebook, None, parameters, prepare_only=True)
    site, name = load_profile(profile), name_of(os.path.abspath(output))
    checked(nb, site)
    number = len(jobs_of(site.jobs_folder, name)) + 1
    return batch_script(site, site.jobs_folder / name / str(number), f"lwz-{name}-{number}")


def _follow(mirror: "Mirror", watch: Watch, patience_s: float = float("inf")) -> End | None:
    started = time.monotonic()
    while not (end := watch.end()) and time.monotonic() - started < patience_s:
        mirror.copy()
        time.sleep(_LOOK_S)
    mirror.copy()
    return end


class Mirror:
    """Copies what the job has done into papermill's notebook: outputs, times, progress."""

    def __init__(self, nb_man, job: Job, log_output: bool, files: dict):
        self.nb_man, self.job, self.log_output, self.files = nb_man, job, log_output, files
        self.path, self.version = job.folder / "live.ipynb", 0
        self.shown: dict[tuple, int] = {}  # characters of a cell's stream that were passed on

    def tell(self, text: str) -> None:
        """Log a line, and show it beside papermill's progress bar."""
        logger.info(text)
        if self.nb_man.pbar is not None:  # None under --no-progress-bar
            self.nb_man.pbar.set_description(text)

    def copy(self) -> None:
        """Take over `live.ipynb` if the job has written it anew; nothing before the job has started."""
        try:
            with self.path.open(encoding="utf-8") as file:  # opening it makes NFS look at the server
                version = os.fstat(file.fileno()).st_mtime_ns
                if version == self.version:
                    return
                live = nbformat.read(file, 4)
        except FileNotFoundError:  # not started yet
            return
        self.version = version
        for index, (mine, theirs) in enumerate(zip(self.nb_man.nb.cells, live.cells, strict=True)):
            mine.metadata.papermill = theirs.metadata.papermill
            if mine.cell_type == "code":
                mine.outputs, mine.execution_count = theirs.outputs, theirs.execution_count
                self._pass_on(index, mine)
        kept = ("widgets", "language_info")
        self.nb_man.nb.metadata.update({key: live.metadata[key] for key in kept if key in live.metadata})
        if self.nb_man.pbar is not None:
            self.nb_man.pbar.n = sum(c.metadata.papermill.status in ("completed", "failed") for c in live.cells)
            self.nb_man.pbar.refresh()
        self.nb_man.save()

    def _pass_on(self, index: int, cell) -> None:
        for stream, level in (("stdout", logger.info), ("stderr", logger.warning)):
            text = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == stream)
            start = self.shown.get((index, stream), 0)
            new = text[start if start <= len(text) else 0 :]  # a cell may clear its output, and a job may start again
            self.shown[index, stream] = len(text)
            if new and self.log_output:
                level(new)
            if new and self.files[stream]:
                self.files[stream].write(new)
                self.files[stream].flush()

    def fail(self, end: End) -> None:
        """Put the end of the job into the cell where it stopped; papermill raises from there, and leaves the rest pending."""
        code = [(index, cell) for index, cell in enumerate(self.nb_man.nb.cells) if cell.cell_type == "code"]
        index, cell = next(((i, c) for i, c in code if c.metadata.papermill.status != "completed"), code[-1])
        tail = self.job.log_tail()
        lines = [f"{end.name}: {end.message}", *([f"the end of {self.job.log}:", *tail] if tail else [])]
        error = nbformat.v4.new_output("error", ename=end.name, evalue=end.message, traceback=lines)
        kept = [out for out in cell.outputs if out.output_type != "error"]
        cell.outputs = [*kept, error, *(out for out in cell.outputs if out.output_type == "error")]
        self.nb_man.cell_exception(cell, cell_index=index)
