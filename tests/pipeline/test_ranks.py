"""Two processes on this machine: they learn what one learns, end together, stop on a signal and go on; how nodes meet."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
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
from lwzlib.method import rewards
from lwzlib.method.queries import load_queries
from lwzlib.pipeline import launch, ranks, stages
from lwzlib.pipeline.stages import _OF_ARMS, arm_stages, needs, run_stage, stage_run

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


needs_deepspeed = pytest.mark.skipif(
    "LWZ_REQUIRE_DEEPSPEED" not in os.environ and not (importlib.util.find_spec("deepspeed") and shutil.which("g++")),
    reason="needs deepspeed and a C++ compiler: `make zero`")


@needs_deepspeed
@pytest.mark.parametrize("zero", [2, 3])
def test_zero_learns_what_one_process_learns(alone, rowwise, tmp_path, zero):
    run = trained(tmp_path, TWO, [f"distributed.zero={zero}"])
    same(run, alone)
    shards = list((run.folder / "checkpoints" / run.status["checkpoint"]).rglob("zero_pp_rank_1*_optim_states.pt"))
    assert shards, "rank 1 has no shard: DeepSpeed did not engage"


@needs_deepspeed
def test_zero_learns_with_a_judge_that_zero_trained(smoke, tmp_path):
    """One process makes its pairs with a whole model; beside a sharded policy it is sharded, and says what it says whole."""
    made = load_recipe("smoke", TWO, ["distributed.zero=3", "cold_start.queries=0", "writing_rm.batch_pairs=2", "grpo.steps=2",
                                      "grpo.kept_completions_per_step=100"])
    run = launch.launch("grpo", made, tmp_path, 0, ARM)
    judge = stage_run("writing-rm", made, tmp_path, 0)
    assert run.finished and judge.finished and len(judge.rows("scores")) == len(judge.rows("pairs_heldout"))
    alone = rewards.WritingReward(str(judge.folder / "model"), made.model.dtype, made.model.attention)
    rows, queries = run.rows("completions"), {q.id: q.query for q in load_queries(made.data.train, made.data.languages)}
    expected = alone([row["completion"] for row in rows], ["think"] * len(rows), [queries[row["id"]] for row in rows])
    assert len(rows) == 2 * made.grpo.group_size * made.grpo.queries_per_step and len(set(expected)) > 1
    assert [row["writing"] for row in rows] == pytest.approx(expected, abs=1e-4)


def family(run: Run) -> tuple[psutil.Process, list[psutil.Process]]:
    """The agent and its ranks, in order."""
    agent = psutil.Process(run.status["pid"]).parent()
    return agent, sorted((p for p in agent.children()), key=lambda p: p.environ()["RANK"])


def test_a_signal_saves_and_the_next_start_ends_as_if_nothing_had_been(smoke, tmp_path):
    asked = [*TWO, "grpo.steps=12", "grpo.checkpoint_every_steps=12"]
    whole = trained(tmp_path / "whole", asked)
    parent, run = start(tmp_path / "stopped", asked)
    until(lambda: run.status.get("step", 0) >= 3, "step 3", 90)
    agent, ranks = family(run)
    agent.send_signal(signal.SIGUSR1)
    said = parent.communicate(timeout=60)[0]
    step = run.status["checkpoint_step"]
    assert "lwzlib.base.processes.Interrupted: the stage was asked to stop, and did after step" in said
    assert 3 <= step < 12 and run.status["state"] == "interrupted" and len(run.rows()) == step
    assert not any(p.is_running() for p in [agent, *ranks])
    trained(tmp_path / "stopped", asked)
    assert comparable(run.rows()) == comparable(whole.rows())
    assert all((weights(run)[name] == value).all() for name, value in weights(whole).items())


def test_a_killed_rank_ends_the_others(smoke, tmp_path):
    parent, run = start(tmp_path, TWO, ["grpo.steps=100000"])
    until(lambda: run.status.get("step", 0) >= 1, "step 1", 90)
    agent, ranks = family(run)
    ranks[1].kill()
    said = parent.communicate(timeout=60)[0]
    assert f"rank 1 of 2 on {os.uname().nodename} ended first, by signal 9" in said
    assert run.status["state"] == "failed" and not any(p.is_running() for p in [agent, *ranks])


def test_ranks_end_with_a_killed_notebook(smoke, tmp_path):
    parent, run = start(tmp_path, TWO, ["grpo.steps=100000"])
    until(lambda: run.status.get("step", 0) >= 1, "step 1", 90)
    agent, ranks = family(run)
    parent.kill()
    parent.wait()
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in [agent, *ranks]), "their end", 30)


def run_ranks(tmp_path, code: str, processes: int = 3):
    """A world of plain Python processes in place of a stage."""
    at = ranks.World(["127.0.0.1"], processes, 1)
    tmp_path.mkdir(exist_ok=True)
    done = subprocess.run([*ranks.agents(at, tmp_path), sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=60)
    return done


def test_the_traceback_of_the_first_rank_that_fails_is_shown(smoke, tmp_path, monkeypatch):
    code = "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('the second rank is broken')\ntime.sleep(600)"
    monkeypatch.setattr(launch, "_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(launch, "needs", lambda *_: [])
    with pytest.raises(RunError, match=r"(?s)rank 1 of 2.*exit code 1.*Traceback.*ValueError: the second rank is broken"):
        trained(tmp_path, TWO)


def test_ranks_know_who_they_are_and_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    done = run_ranks(tmp_path, f"import os; print(*[os.environ[n] for n in {names}])", 2)
    assert done.returncode == 0
    threads = max(1, os.cpu_count() // 2)
    assert done.stdout == f"0 0 2 2 127.0.0.1 1 {threads}\n" == (tmp_path / "rank-000.log").read_text()
    assert (tmp_path / "rank-001.log").read_text() == f"1 1 2 2 127.0.0.1 1 {threads}\n"


def test_ranks_that_stop_when_asked_did_not_fail(tmp_path):
    assert run_ranks(tmp_path, f"raise SystemExit({INTERRUPTED})").returncode == INTERRUPTED
    assert not list(tmp_path.glob("failed-*"))


def test_a_rank_that_does_not_end_is_killed(tmp_path, monkeypatch):
    code = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" \
           "os.environ['RANK'] == '0' and os._exit(3)\ntime.sleep(600)"
    started = time.monotonic()
    assert run_ranks(tmp_path, code, 2).returncode == 3
    assert time.monotonic() - started < ranks._GRACE_S + 15


def test_nodes_meet_before_anything_is_started():
    port, errors = _free_port(), []

    def node(number):
        try:
            ranks.meet("127.0.0.1", port, number, 3, 20)
        except RunError as error:
            errors.append(error)

    threads = [threading.Thread(target=node, args=(number,)) for number in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_a_node_that_cannot_be_reached_is_named_within_the_patience():
    port = _free_port()
    with pytest.raises(RunError, match=f"node 1 .* cannot reach the head node at 127.0.0.1:{port} within 0.3 s"):
        ranks.meet("127.0.0.1", port, 1, 2, 0.3)
    with pytest.raises(RunError, match=f"of 3 nodes, node 1, 2 did not reach 127.0.0.1:{port} within 0.3 s"):
        ranks.meet("127.0.0.1", port, 0, 3, 0.3)


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
    ("launch=torchrun distributed.zero=2 distributed.offload=all", "needs a higher ZeRO stage"),
    ("launch=slurm distributed.nodes=2 vllm.mode=server", "vllm.nodes = 0 must be 1 to 1"),
    ("launch=slurm distributed.nodes=2 vllm.nodes=1", "0 elsewhere"),
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


@pytest.mark.parametrize("name", ["nano", "smoke", "paper"])
def test_what_a_stage_needs_is_what_it_asks_for(name, tmp_path, monkeypatch):
    """`launch` does the needs first, each by its own launch; then the stage itself must find all of them finished."""
    made = load_recipe(name, "data.train=kit:train data.heldout=kit:heldout reward.length.max_words=14000")
    for arm in made.arms:
        for stage in ("cold-start", "writing-rm", "corpus", "distil", "pack", "pretrain", *arm_stages(made, arm)):
            asked, original = [], run_stage

            def first(other, recipe, root, seed, of=None, own=stage, asked=asked, original=original):
                if other == own and not asked:
                    asked.append(None)
                    return original(other, recipe, root, seed, of)
                asked.append((other, of))
                return tmp_path

            monkeypatch.setattr(stages, "run_stage", first)
            for module, functions in _WORK.items():
                for function in functions:
                    monkeypatch.setattr(f"lwzlib.{module}.{function}", lambda *_: tmp_path)
            run_stage(stage, made, tmp_path, 0, arm if stage in _OF_ARMS else "")
            found = needs(stage, made, arm if stage in _OF_ARMS else "")
            assert {other for other, _ in asked[1:]} == {other for other, _ in found}, (arm, stage)
            monkeypatch.undo()


_WORK = {"method.cold_start": ["cold_start"], "method.pretrain": ["pretrain"], "method.train_writing_rm": ["train_rm"],
         "method.sft": ["train_sft"], "method.grpo": ["train_arm"], "method.distil": ["distil"],
         "data.tokenise": ["prepare_corpus"], "data.packing": ["pack"],
         "method.samples": ["write_samples", "write_samples_during"]}


def test_what_does_not_train_stops_at_once_on_the_signal(monkeypatch):
    monkeypatch.setattr(Stop, "asked", False)  # and again after the test: what trains in this process would stop
    before = signal.getsignal(signal.SIGUSR1)
    try:
        Stop.listen()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR1)
        monkeypatch.setattr(Stop, "asked", False)
        monkeypatch.setattr(Stop, "training", True)
        signal.raise_signal(signal.SIGUSR1)
        assert Stop.asked
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interrupted_is_no_failure():
    assert issubclass(Interrupted, RunError)
