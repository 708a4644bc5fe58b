"""Two processes on this machine: they learn what one learns, end together, stop on a signal and go on; how nodes meet."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from polling import until
from smoke_runs import ARM, comparable, same, start, trained, weights

from lwzlib.base import trainers
from lwzlib.base.processes import INTERRUPTED, Interrupted, Stop
from lwzlib.base.recipe import RecipeError, load_recipe
from lwzlib.base.rows import RunError
from lwzlib.base.run_folder import Run
from lwzlib.pipeline import launch, ranks
from lwzlib.pipeline.stages import stage_run

TWO = ["launch=torchrun", "distributed.processes=2", "grpo.micro_batch_completions=2"]


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_two_processes_learn_what_one_learns(alone, rowwise, tmp_path, capfd):
    run = trained(tmp_path, TWO)
    same(run, alone)
    assert run.status["state"] == "finished" and [row["step"] for row in run.rows()] == [1, 2, 3, 4]
    assert {path.name for path in (run.folder / "logs").iterdir()} == {"rank-000.log", "rank-001.log"}
    assert capfd.readouterr().out.count("base-think/grpo  step 1/4") == 1  # of rank 0 alone
    assert trained(tmp_path, TWO).status == run.status


def family(run: Run) -> tuple[psutil.Process, list[psutil.Process]]:
    """torchrun and its ranks, in order."""
    torchrun = psutil.Process(run.status["pid"]).parent()
    return torchrun, sorted(torchrun.children(), key=lambda rank: rank.environ()["RANK"])


@pytest.mark.parametrize("interrupted", ["ranks", "notebook in a job"])
def test_a_signal_saves_and_the_next_start_ends_as_if_nothing_had_been(smoke, tmp_path, monkeypatch, interrupted):
    asked = [*TWO, "grpo.steps=12", "grpo.checkpoint_every_steps=12"]
    whole = trained(tmp_path / "whole", asked)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    parent, run = start(tmp_path / "stopped", asked)
    until(lambda: run.status.get("step", 0) >= 3, "step 3", 90)
    torchrun, ranks = family(run)
    if interrupted == "ranks":
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)
        expected = "lwzlib.base.processes.Interrupted: the stage was asked to stop, and did after step"
    else:
        parent.send_signal(signal.SIGINT)
        expected = "KeyboardInterrupt"
    said = parent.communicate(timeout=60)[0]
    step = run.status["checkpoint_step"]
    assert expected in said
    assert 3 <= step < 12 and run.status["state"] == "interrupted" and len(run.rows()) == step
    assert not any(p.is_running() for p in [torchrun, *ranks])
    trained(tmp_path / "stopped", asked)
    assert comparable(run.rows()) == comparable(whole.rows())
    assert all((weights(run)[name] == value).all() for name, value in weights(whole).items())


def test_a_killed_rank_ends_the_others(smoke, tmp_path):
    parent, run = start(tmp_path, TWO, ["grpo.steps=100000"])
    until(lambda: run.status.get("step", 0) >= 1, "step 1", 90)
    torchrun, ranks = family(run)
    ranks[1].kill()
    said = parent.communicate(timeout=60)[0]
    assert f"rank 1 of 2 on {os.uname().nodename} ended first, by signal 9" in said
    assert run.status["state"] == "failed" and not any(p.is_running() for p in [torchrun, *ranks])


def test_ranks_end_with_a_killed_notebook(smoke, tmp_path):
    parent, run = start(tmp_path, TWO, ["grpo.steps=100000"])
    until(lambda: run.status.get("step", 0) >= 1, "step 1", 90)
    torchrun, ranks = family(run)
    parent.kill()
    parent.wait()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in [torchrun, *ranks]), "their end", 30)


def run_ranks(tmp_path, code: str, processes: int = 3):
    """A world of plain Python processes in place of a stage."""
    at = ranks.world(load_recipe("smoke", TWO, [f"distributed.processes={processes}"]))
    command, env = ranks.in_every_rank(at, [sys.executable, "-c", code], tmp_path)
    return at, subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=90)


SHARED = """
import torch
from accelerate import PartialState
from trl.trainer.utils import add_fused_lm_head
from lwzlib.base.models import load_model
from lwzlib.method.pretrain import perplexity
from lwzlib.base.scoring import scores_together

torch.manual_seed(0)
PartialState(cpu=True)
model, tokenizer = load_model("kit:tiny", "float32", "eager")
scorer, _ = load_model("kit:tiny", "float32", "eager", scorer=True)
add_fused_lm_head(model)
passes = []
model.model.register_forward_hook(lambda *_: passes.append("perplexity"))
scorer.model.register_forward_hook(lambda *_: passes.append("score"))
texts = ["one text of a few words", "a second", "and the third, longest of all of them", "4", "five"]
print(perplexity(model, tokenizer, texts, 8, 200))
print(sorted(scores_together(scorer, tokenizer(texts).input_ids).items()))
print(passes.count("perplexity"), passes.count("score"))
"""


def test_ranks_share_what_they_measure(smoke, tmp_path):
    """Two ranks agree with one, and each makes half of its passes over the held-out text."""
    said = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        _, done = run_ranks(folder, SHARED, processes)
        assert done.returncode == 0, ranks.tail(folder / "rank-000.log")
        said[processes] = [(folder / f"rank-00{rank}.log").read_text().splitlines()[-3:] for rank in range(processes)]
    (alone,), (first, second) = said.values()
    assert first[:2] == second[:2] == alone[:2], "they measure the same"
    every, ours = ([int(count) for count in lines[2].split()] for lines in (alone, first))
    assert ours[0] == -(-every[0] // 2) > 2 and first[2] == second[2] and ours[1] == every[1] == 1


ASKING = """
import asyncio
from accelerate import PartialState
from lwzlib.base.awaited import from_main

rank = PartialState(cpu=True).process_index

async def ask(items):
    assert rank == 0
    if "bad" in items:
        raise LookupError("no such judge")
    return [item.upper() for item in items]

own = {0: ["a"], 1: [], 2: ["b", "c"]}[rank]
print(asyncio.run(from_main(ask, own)))
try:
    asyncio.run(from_main(ask, ["bad"] if rank == 1 else own))
except (LookupError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


def test_one_rank_asks_for_all_and_its_error_is_everyones(tmp_path):
    _, done = run_ranks(tmp_path, ASKING)
    assert done.returncode == 0, ranks.tail(tmp_path / "rank-000.log")
    said = [(tmp_path / f"rank-00{rank}.log").read_text().splitlines() for rank in range(3)]
    others = "RunError: in the main process, LookupError: no such judge"
    assert said == [["['A']", "LookupError: no such judge"], ["[]", others], ["['B', 'C']", others]]


def test_the_traceback_of_the_first_rank_that_fails_is_shown(smoke, tmp_path, monkeypatch):
    code = "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('the second rank is broken')\ntime.sleep(600)"
    monkeypatch.setattr(launch, "stage_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(launch, "needs", lambda *_: [])
    with pytest.raises(RunError, match=r"(?s)rank 1 of 2.*exit code 1.*Traceback.*ValueError: the second rank is broken"):
        trained(tmp_path, TWO)


def test_ranks_know_who_they_are_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    at, done = run_ranks(tmp_path, f"import os; print(*[os.environ[n] for n in {names}])", 2)
    assert done.returncode == 0, done.stderr
    threads = max(1, os.cpu_count() // 2)
    for rank in range(2):
        assert (tmp_path / f"rank-00{rank}.log").read_text() == f"{rank} {rank} 2 2 127.0.0.1 {at.port} {threads}\n"


def test_of_stages_that_are_one_process_those_that_train_see_one_gpu(smoke, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(launch, "_do", lambda command, runs, world=None, env=None: seen.update({runs[0].folder.name: env}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    made = load_recipe("smoke", TWO)
    for stage in ("cold-start", "samples-before"):
        launch.launch(stage, made, tmp_path, 0, ARM)
    assert seen["cold-start"] == {"CUDA_VISIBLE_DEVICES": "4"} and seen["samples-before"] == {}
    assert "CUDA_VISIBLE_DEVICES" not in seen["writing-rm"], "it is many"


def test_ranks_that_stop_when_asked_did_not_fail(smoke, tmp_path, monkeypatch):
    code = f"from lwzlib.base.processes import end_rank; end_rank({INTERRUPTED})"
    monkeypatch.setattr(launch, "stage_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(Interrupted, match="the stage was asked to stop, and did after step 0"):
        trained(tmp_path, TWO)


def test_a_rank_that_does_not_end_is_killed(tmp_path):
    code = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" \
           "os.environ['RANK'] == '0' and time.sleep(2) or os.environ['RANK'] == '0' and os._exit(3)\ntime.sleep(600)"
    started = time.monotonic()
    at, done = run_ranks(tmp_path, code, 2)
    assert "rank 0 of 2" in (said := ranks.failure(at, done.stderr, tmp_path)) and "with exit code 3" in said
    assert 30 < time.monotonic() - started < 60, "torchrun waits 30 s for the other"


def meeting(numbers: tuple[int, ...], nodes: int, patience_s: float) -> tuple[list[str], str]:
    """Lines that were printed, and what went wrong, in tasks of `meet` with these numbers on this machine."""
    port = ranks.world(load_recipe("smoke", TWO)).port
    command = [sys.executable, "-m", "lwzlib.pipeline.ranks", "127.0.0.1", str(port), str(nodes), str(patience_s)]
    tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(number), "SLURMD_NODENAME": f"node{number}"},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for number in numbers]
    said = [task.communicate(timeout=60) for task in tasks]
    return "".join(out for out, _ in said).splitlines(), "".join(error for _, error in said)


def test_nodes_meet_before_anything_is_started():
    lines, error = meeting((2, 1, 0), 3, 30)
    assert not error and set(lines) == {f"node{number} 127.0.0.1 lo" for number in range(3)}


def test_a_node_that_cannot_be_reached_is_named_within_the_patience(program):
    names, error = meeting((1,), 2, 0.3)
    assert not names and re.search(r"node1 cannot reach the head node at 127.0.0.1:\d+ within 0.3 s", error)
    program("srun", "import sys; print('node1 10.0.0.1 e\\nnode3 10.0.0.3 e'); "
            "sys.exit('node2 cannot reach the head node')")
    with pytest.raises(RunError, match=r"(?s)of 3 nodes, node2 did not reach node1:6 within 50 s.*node2 cannot reach the head"):
        ranks.meet(ranks.World(["node1", "node2", "node3"], 8, 5, slurm=True))


@pytest.mark.parametrize(("said", "expected"), [
    ("srun: error: n2: task 9: Killed\nsrun: error: n1: tasks 0-7: Terminated", "rank 9 of 16 on n2 ended first, by signal 9 "),
    ("srun: error: n1: tasks 3,5: Exited with exit code 2", "rank 3 of 16 on n1 ended first, with exit code 2 "),
    ("srun: error: n2: task 8: Out Of Memory", "rank 8 of 16 on n2 ended first: Out Of Memory "),
    ("srun: error: Unable to create step for job 5: Requested node configuration is not available", "")])
def test_what_srun_says_of_the_first_rank_that_failed(tmp_path, said, expected):
    at = ranks.World(["n1", "n2"], 8, 5, slurm=True)
    assert ranks.failure(at, f"step 1/4\n{said}\n", tmp_path).startswith(expected)


def test_ports_of_a_job_are_its_own_and_below_those_of_clients():
    ports = [ranks.job_port(str(job)) for job in range(4_000)]
    assert len(set(ports)) == 4_000 and min(ports) >= 10_000 and max(ports) + 4 < 32_768
    assert all(port % 5 == 0 for port in ports)


def test_a_step_that_cannot_be_cut_over_the_processes_is_refused_before_anything_starts(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "needs", lambda *_: [])
    with pytest.raises(RunError, match="4 completions a step cannot be cut into micro-batches of 2 on 3 processes"):
        trained(tmp_path, TWO, ["distributed.processes=3"])
    assert not (tmp_path / ARM).exists()


@pytest.mark.parametrize(("overrides", "reason"), [
    ("distributed.nodes=2", "nodes = 2 needs launch: slurm"),
    ("distributed.processes=2", "launch: subprocess is one process"),
    ("launch=torchrun distributed.processes=2 distributed.zero=3", "cannot merge an adapter"),
    ("launch=torchrun distributed.zero=3 grpo.lora.rank=0", "an adapter: give zero: 2, or writing_rm.lora.rank: 0"),
    ("launch=torchrun distributed.zero=2 distributed.offload=all", "needs a higher ZeRO stage"),
    ("launch=slurm distributed.nodes=2 vllm.mode=server", "vllm.nodes = 0 must be 1 to 1"),
    ("launch=slurm distributed.nodes=2 vllm.nodes=1", "0 elsewhere"),
    ("launch=inline vllm.mode=colocate", "needs launch: subprocess, torchrun or slurm"),
    ("launch=torchrun distributed.processes=3 vllm.mode=colocate vllm.tensor_parallel=2", "must divide")])
def test_a_placement_that_cannot_be_is_refused(overrides, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe("nano", overrides)


def test_where_a_run_is_placed_does_not_change_what_it_is(smoke, tmp_path):
    alone, spread = (stage_run("grpo", load_recipe("smoke", more), tmp_path, 0, ARM) for more in
                     ([], ["launch=torchrun", "distributed.processes=2", "distributed.checkpoint_every_minutes=5"]))
    assert alone.fingerprint == spread.fingerprint


def test_slurm_without_an_allocation_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(RunError, match="--engine slurm"):
        ranks.world(load_recipe("paper"))


def test_a_checkpoint_is_due_by_the_clock(smoke, tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    made = load_recipe("smoke", "distributed.checkpoint_every_minutes=1")
    rows = trainers.Rows(Run(tmp_path, made, 0, ("grpo",)), {})
    control, args = TrainerControl(), TrainingArguments(str(tmp_path), use_cpu=True)
    rows.on_step_end(args, TrainerState(), control)
    assert not control.should_save
    rows.saved -= 61
    rows.on_step_end(args, TrainerState(), control)
    assert control.should_save and not control.should_training_stop
    rows.on_save(args, TrainerState(), control)
    control.should_save = False
    rows.on_step_end(args, TrainerState(), control)
    assert not control.should_save


def test_what_does_not_train_stops_at_once_on_the_signal(monkeypatch):
    monkeypatch.setattr(Stop, "asked", False)  # and again after the test: what trains in this process would stop
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        Stop.listen()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR1)
        monkeypatch.setattr(Stop, "asked", False)
        monkeypatch.setattr(Stop, "training", True)
        signal.raise_signal(signal.SIGUSR1)
        assert Stop.asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_interrupted_is_no_failure():
    assert issubclass(Interrupted, RunError)
