"""Commands about GPUs and Slurm, under `lwz`: estimate, jobs, submit."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lwzlib.base.recipe import parse_overrides
from lwzlib.cli.options import CLUSTER, Overrides, out

app = typer.Typer()
Site = Annotated[str | None, typer.Option(help="A profile and what this job changes in it, such as 'generic nodes=8'. Default: "
                                               "LWZ_PROFILE, else site, else generic.")]


@app.command(rich_help_panel=CLUSTER)
def estimate(recipe: str, sets: Overrides = None,
             nodes: Annotated[int | None, typer.Option(help="Default: distributed.nodes of the recipe.")] = None,
             gpus: Annotated[int | None, typer.Option(help="A node; default: distributed.processes of the recipe.")] = None,
             gpu: Annotated[str, typer.Option(help="h800, h100, h200 or a100.")] = "h800",
             gpu_gib: Annotated[float | None, typer.Option(help="Memory of a GPU, where it is another.")] = None,
             mean_tokens: Annotated[float | None, typer.Option(help="Of a completion; default: half of the most.")] = None):
    """Work out GPU memory, disk, and the time of GRPO.

    With the arithmetic. Exit code 1 for a recipe that cannot fit."""
    from lwzlib.cluster.plan_pages import planned, show_plan

    plan = planned(recipe, sets, nodes, gpus, gpu, gpu_gib, mean_tokens)
    reasons = show_plan(plan, out)
    for reason in reasons:
        print(f"lwz: recipe {recipe} cannot run on {plan.gpus} x {plan.gpu.name}: {reason}", file=sys.stderr)
    raise typer.Exit(int(bool(reasons)))


@app.command(rich_help_panel=CLUSTER)
def jobs(profile: Site = None, every: Annotated[bool, typer.Option("--all", help="Earlier jobs of an output too.")] = False):
    """Show the Slurm jobs of notebooks.

    State, nodes, step and throughput, from Slurm, the job and its run folder."""
    from lwzlib.cluster.jobs import jobs_of, summary
    from lwzlib.cluster.profile import load_profile

    folder = load_profile(profile).jobs_folder
    table = Table("job", "notebook", "output", "state", "nodes", "stage", "step", "tokens/s", "submitted", title=str(folder),
                  box=None)
    for path in sorted(folder.glob("*/")):
        for job in jobs_of(folder, path.name)[0 if every else -1 :]:
            record, submitted = job.record, time.localtime(job.record["submitted"])
            table.add_row(str(record.get("job_id") or "none"), Path(record["notebook"]).stem, record["output"],
                          *summary(job).values(), time.strftime("%m-%d %H:%M", submitted))
    out.print(table)


@app.command(rich_help_panel=CLUSTER)
def submit(notebook: Path, output: Path,
           parameters: Annotated[list[str] | None, typer.Option("--parameter", "-p", help="name=value; repeatable")] = None,
           profile: Site = None,
           dry_run: Annotated[bool, typer.Option(help="Print the batch script; submit nothing.")] = False):
    """Run a notebook as a Slurm job.

    As `papermill NOTEBOOK OUTPUT --engine slurm` does."""
    import papermill

    from lwzlib.cluster import engine

    values = parse_overrides(parameters)
    if dry_run:
        print(engine.dry_run(notebook, output, values, profile))
    else:
        papermill.execute_notebook(notebook, output, values, engine_name="slurm", profile=profile, log_output=True)
