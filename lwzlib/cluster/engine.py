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
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine
from papermill.log import logger

from lwzlib.base.kit import ModelError
from lwzlib.base.quantities import nearest_name
from lwzlib.base.recipe import Recipe, RecipeError, load_recipe
from lwzlib.base.rows import RunError, locked, write_atomic
from lwzlib.cluster.jobs import End, Job, ask_slurm, id_of, jobs_of, name_of, watch
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
    """The engine. `profile` is an option of papermill.execute_notebook; on the command line it comes from LWZ_PROFILE."""

    @classmethod
    def execute_notebook(cls, nb, kernel_name, output_path=None, input_path=None, profile=None, start_timeout=60,
                         execution_timeout=None, **options):
        """Check, submit (or find) the job, and follow it. Raises Refused before anything is submitted or written."""
        try:
            if not output_path or "://" in str(output_path):
                raise ClusterError("the engine slurm writes the notebook while the job runs: give a path on the file system as "
                                   "output, and leave papermill's request_save_on_cell_execute on")
            site, output = load_profile(profile), os.path.abspath(output_path)
            record = {"notebook": str(input_path), "output": output, "parameters": checked_parameters(nb, site),
                      "cwd": os.getcwd(), "kernel": kernel_name, "profile": site.model_dump(),
                      "options": {"start_timeout": start_timeout, "execution_timeout": execution_timeout}}
            # What is computed; the site may change.
            content = [[cell.source for cell in nb.cells], record["cwd"], kernel_name]
            record["digest"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            folder = site.jobs_folder / name_of(output)
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / "lock"):
                job = attached(site, record) or submitted(site, record, nb)
                return super().execute_notebook(nb, kernel_name, output_path=output_path, job=job, **options)
        except (ClusterError, RecipeError, RunError) as error:
            raise Refused(str(error)) from None

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, job=None, log_output=False, stdout_file=None, stderr_file=None, **_):
        """Fill papermill's notebook (`nb_man`) from the job until that ends. Ctrl-C cancels the job."""
        mirror = Mirror(nb_man, job, PapermillNotebookClient(
            nb_man, log=logger, log_output=log_output, stdout_file=stdout_file, stderr_file=stderr_file))
        try:
            end = mirror.follow()
        except KeyboardInterrupt:
            mirror.tell(f"job {job.record['job_id']}: cancelling")
            job.cancel()
            mirror.follow(_CANCEL_PATIENCE_S)
            mirror.fail(End("CANCELLED", "JobCancelled", f"Slurm job {job.record['job_id']} was cancelled by Ctrl-C"))
            raise
        job.note(seen=True)
        if end.name:
            mirror.fail(end)


def parameters_of(nb) -> dict:
    """{name: literal value} of the cell tagged `parameters`; None for a value that is computed."""
    parameters: dict = {}
    tagged = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", [])]
    for node in ast.parse(tagged[0].source).body if tagged else []:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            try:
                parameters[name] = ast.literal_eval(node.value)
            except ValueError:
                parameters[name] = None
    return parameters


def checked_parameters(nb, site: Profile) -> dict:
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
        recipe = load_recipe(parameters["recipe"], parameters.get("overrides"))
        if parameters.get("run_dir") == "":
            parameters["run_dir"] = str(run_folder(recipe, int(parameters.get("seed") or 0)))
        if "arm" in parameters:
            recipe.for_arm(parameters["arm"])
            _check_fit(recipe, site)
    return parameters


def _check_fit(recipe: Recipe, site: Profile) -> None:
    """Raise ClusterError for a recipe that cannot run on the nodes that the profile asks for, or that would be killed at the
    time limit before it has saved."""
    from lwzlib.cluster import readiness, step_time
    from lwzlib.cluster.estimate import GPUS, make_plan

    if why := readiness.reasons(recipe, readiness.asked_of(site)):
        raise ClusterError(f"recipe {recipe.name} cannot run on {site.gpu or 'these nodes'}: {'; '.join(why)} (overrides "
                           "change the recipe, LWZ_PROFILE the profile; see `lwz doctor` and `lwz estimate`)")
    if not site.gpu:
        return
    try:
        plan = make_plan(recipe, GPUS[site.gpu])
    except (RecipeError, ModelError):  # a model of unknown shape: nothing to compute with
        return
    step_s, save_s = step_time.simulate_step(plan).seconds, step_time.checkpoint(plan).value
    if site.stop_before_end_s < step_s + save_s:
        raise ClusterError(f"stop_before_end_s = {site.stop_before_end_s} of the profile is less than a step of recipe "
                           f"{recipe.name}, about {step_s:.0f} s, and its checkpoint, about {save_s:.0f} s: at the time limit "
                           f"the job would be killed before it has saved; give {2 * (step_s + save_s):.0f} or more")


def attached(site: Profile, record: dict) -> Job | None:
    """The job that makes this output: one that still runs, or one whose result nobody has seen yet."""
    earlier = jobs_of(site.jobs_folder, name_of(record["output"]))
    if not earlier or (before := (job := earlier[-1]).record).get("seen"):
        return None
    if not (job_id := before.get("job_id") or id_of(before["name"])):
        return None  # the client died before it submitted
    job.note(job_id=job_id)
    if (status := ask_slurm(job_id)) is None:
        raise ClusterError(f"Slurm does not answer, and its job {job_id} may still make {record['output']}")
    end, same = job.end(status), before["digest"] == record["digest"]
    if end and not (same and end.state in ("finished", "failed")):
        logger.info(f"{end.message or f'Slurm job {job_id} {end.state}'}; submitting anew")
        return None
    if not same:
        differences = [f"{key} was {value!r}, is {record['parameters'].get(key)!r}" for key, value in
                       before["parameters"].items() if value != record["parameters"].get(key)]
        raise ClusterError(f"{record['output']} is being made by Slurm job {job_id} of another notebook "
                           f"({'; '.join(differences) or 'its cells or its working directory differ'}). "
                           f"Choose another output, or: scancel {job_id}")
    logger.info(f"Slurm job {job_id}, submitted {time.ctime(before['submitted'])}, found again")
    return job


def submitted(site: Profile, record: dict, nb) -> Job:
    """A new job. Its folder tells the whole story: job.json, input.ipynb, live.ipynb, state.json, its script and its log."""
    job, name = _next_job(site, record["output"])
    check_job(site, job.folder, name)
    job.folder.mkdir(exist_ok=True)
    nbformat.write(nb, job.folder / "input.ipynb")
    write_atomic(job.folder / "job.json", json.dumps(record | {"name": name, "submitted": time.time()}, indent=1))
    job.note(job_id=submit_job(site, job.folder, name))
    logger.info(f"Slurm job {job.record['job_id']}: {job.folder}")
    return job


def _next_job(site: Profile, output: str) -> tuple[Job, str]:
    """The next job of an output, not made yet, and its name."""
    name, earlier = name_of(output), jobs_of(site.jobs_folder, name_of(output))
    number = int(earlier[-1].folder.name) + 1 if earlier else 1
    return Job(site.jobs_folder / name / str(number)), f"lwz-{name}-{number}"


def dry_run(notebook, output, parameters: dict, profile: str | None) -> str:
    """The batch script of a job, after all the checks that need no Slurm. Raises ClusterError or RecipeError."""
    nb, site = papermill.execute_notebook(notebook, None, parameters, prepare_only=True), load_profile(profile)
    checked_parameters(nb, site)
    job, name = _next_job(site, os.path.abspath(output))
    return batch_script(site, job.folder, name)


class Mirror:
    """Copies what the job has done into papermill's notebook: outputs, times, progress. `client` logs what cells print."""

    def __init__(self, nb_man, job: Job, client: PapermillNotebookClient):
        self.nb_man, self.job, self.client = nb_man, job, client
        self.path, self.version = job.folder / "live.ipynb", 0
        self.shown: dict[tuple, int] = {}  # characters of a cell's stream that were passed on

    def follow(self, patience_s: float = float("inf")) -> End | None:
        """Copy until the job has ended; how it did, or None after `patience_s` s."""
        deadline = time.monotonic() + patience_s
        for end in watch(self.job, self.tell):
            self.copy()
            if end or time.monotonic() > deadline:
                return end
            time.sleep(_LOOK_S)
        return None

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
        """Log what a cell has printed since the last look."""
        for stream in ("stdout", "stderr"):
            text = "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == stream)
            start = self.shown.get((index, stream), 0)
            new = text[start if start <= len(text) else 0 :]  # a cell may clear its output, and a job may start again
            self.shown[index, stream] = len(text)
            if new:
                self.client.log_output_message(nbformat.v4.new_output("stream", name=stream, text=new))

    def fail(self, end: End) -> None:
        """Put the end of the job into the cell where it stopped; papermill raises from there, and leaves the rest pending."""
        code = [(index, cell) for index, cell in enumerate(self.nb_man.nb.cells) if cell.cell_type == "code"]
        index, cell = next(((i, c) for i, c in code if c.metadata.papermill.status != "completed"), code[-1])
        tail = self.job.log_tail()
        lines = [f"{end.name}: {end.message}", *([f"the end of {self.job.log}:", *tail] if tail else [])]
        error = nbformat.v4.new_output("error", ename=end.name, evalue=end.message, traceback=lines)
        # The job's error comes after what the cell printed and before the cell's own: papermill raises from the first.
        cell.outputs = sorted([error, *cell.outputs], key=lambda output: output.output_type == "error")
        self.nb_man.cell_exception(cell, cell_index=index)
