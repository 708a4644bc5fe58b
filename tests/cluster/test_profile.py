"""Site profiles: the scripts they make, and what they refuse."""

import subprocess
from pathlib import Path

import papermill
import pytest
import yaml

from lwzlib.base.paths import ROOT
from lwzlib.cluster import engine, readiness
from lwzlib.cluster.profile import ClusterError, batch_script, check_job, load_profile, profile_names

SCRIPTS = Path(__file__).parents[1] / "batch_scripts"
FOLDER, NAME = Path("/shared/lwz/runs/jobs/out-0a1b2c3d/1"), "lwz-out-0a1b2c3d-1"
ELSEWHERE = "python=/shared/python"  # another environment than this one, which has neither vLLM nor DeepSpeed
ASKED = {
    "generic": "generic python=/shared/lwz/.venv/bin/python",
    "container": "container",
    "site": "generic nodes=8 partition=gpu account=writing qos=long gres=gpu:h100:8 time=2-00:00:00 requeues=0 offline=true "
            "sbatch.exclusive=true memory_gb_per_node=512 'modules=[cuda/13.0, nccl]' 'setup=[ulimit -n 65536]' "
            "environment.NCCL_SOCKET_IFNAME=ib0 scratch=/scratch cache='/shared/the cache' "
            "python=/shared/lwz/.venv/bin/python",
}


@pytest.fixture
def write(tmp_path):
    def written(name="mine", **tree):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return str(tmp_path / f"{name}.yaml")

    return written


@pytest.mark.parametrize("name", ASKED)
def test_the_script_of_a_profile_is_the_committed_one(name):
    """A change here is a change of every job: look at it, and write the new script to the file."""
    script = batch_script(load_profile(ASKED[name]), FOLDER, NAME)
    assert script == (SCRIPTS / f"{name}.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_every_profile_has_a_committed_script():
    assert set(profile_names()) - {"site"} <= set(ASKED)


@pytest.mark.parametrize(("asked", "reason"), [
    ("genric", "no profile 'genric'; did you mean 'generic'"),
    ("/no/such/site.yaml", "no profile '/no/such/site.yaml'"),
    ("generic partion=gpu", "no key 'partion'; did you mean 'partition'"),
    ("generic nodes", "override 'nodes' is not of the form name=value"),
    ("generic nodes=many", "nodes = 'many': Input should be a valid integer"),
    ("generic time=tomorrow", "time = 'tomorrow': String should match pattern"),
    ("generic 'time=1 day", "No closing quotation"),
    ("generic time=00:40:00", "time = 00:40:00 must be longer than stop_before_end_s = 2400 s"),
    ("generic sbatch.constraint=[h100]", "sbatch.constraint"),
])
def test_what_is_wrong_in_a_profile_is_named(asked, reason):
    with pytest.raises(ClusterError, match=reason):
        load_profile(asked)


def test_a_profile_extends_another_and_states_what_differs(write):
    below = write("below", extends="generic", partition="gpu", nodes=2)
    found = load_profile(write(extends=below, nodes=4) + " account=writing")
    assert (found.partition, found.nodes, found.account, found.gpus_per_node) == ("gpu", 4, "writing", 8)


def test_a_profile_that_extends_itself_is_refused(tmp_path, write):
    with pytest.raises(ClusterError, match="extends itself"):
        load_profile(write(extends=str(tmp_path / "mine.yaml")))


def test_a_time_that_yaml_reads_in_base_60_is_refused_in_a_file_and_understood_when_typed(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: generic\ntime: 12:00:00\n")
    with pytest.raises(ClusterError, match='time = 43200: put the time in quotes: "12:00:00"'):
        load_profile(str(tmp_path / "mine.yaml"))
    assert load_profile("generic time=12:00:00").minutes == 720


@pytest.mark.parametrize(("time", "minutes"), [("00:10:00", 10), ("1-02:03:00", 1563), ("00:00:01", 1), ("100:00:00", None)])
def test_a_time_limit_is_whole_minutes_rounded_up(time, minutes):
    if minutes is None:
        with pytest.raises(ClusterError, match="time = '100:00:00'"):
            load_profile(f"generic time={time}")
    else:
        assert load_profile(f"generic time={time} stop_before_end_s=1").minutes == minutes


def test_the_variable_names_the_profile_and_the_option_wins(monkeypatch):
    monkeypatch.setenv("LWZ_PROFILE", "generic nodes=3")
    assert (load_profile().nodes, load_profile("generic nodes=5").nodes) == (3, 5)


def test_a_dry_run_prints_the_script_without_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    script = engine.dry_run(ROOT / "notebooks" / "05_train_grpo.ipynb", tmp_path / "out.ipynb",
                           {"recipe": "paper"}, f"generic nodes=8 {ELSEWHERE}")
    assert "#SBATCH --nodes=8\n" in script and "\nexec " in script and not (tmp_path / "out.ipynb").exists()


def test_a_job_is_refused_on_a_machine_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match="this machine has no sbatch: start from a login node"):
        check_job(load_profile("generic"), FOLDER, NAME)


def checked(recipe, overrides, profile):
    nb = papermill.execute_notebook(ROOT / "notebooks" / "05_train_grpo.ipynb", None, prepare_only=True,
                                    parameters={"recipe": recipe, "overrides": overrides})
    return engine.checked_parameters(nb, load_profile(profile))


@pytest.mark.parametrize(("recipe", "profile", "overrides", "reason"), [
    ("paper", "generic", "", "it wants 8 nodes, and the profile gives nodes=1"),
    ("paper", "generic nodes=8 gpus_per_node=4", "", "wants 8 processes a node, and the profile gives gpus_per_node=4"),
    ("paper", "generic nodes=8", "distributed.zero=2", "recipe paper cannot run on h100: .*72"),
    ("paper", "generic nodes=8", "grpo.gradient_checkpointing=false", r"cannot run on h100: .*grpo: a GPU that trains needs 3"),
    ("gpu", "generic", "", "launch: subprocess is one process and sees 8 GPUs, which TRL refuses"),
    ("paper", "generic nodes=8 stop_before_end_s=600", "",
     r"stop_before_end_s = 600 of the profile is less than a step of recipe paper, about 7\d\d s, and its checkpoint, about 2"),
])
def test_a_recipe_that_the_job_cannot_hold_is_refused_before_it_is_submitted(recipe, profile, overrides, reason):
    with pytest.raises(ClusterError, match=reason):
        checked(recipe, overrides, f"{profile} {ELSEWHERE}")


@pytest.mark.parametrize(("recipe", "profile"), [("paper", "nodes=8"), ("gpu", "gpus_per_node=1"), ("nano", "gpus_per_node=1"),
                                                 ("smoke", "gpu=null gpus_per_node=0")])
def test_a_recipe_that_the_job_can_hold_is_taken(recipe, profile):
    assert checked(recipe, "", f"generic {profile} {ELSEWHERE}")["recipe"] == recipe


def test_packages_are_those_of_the_python_that_submits_unless_the_nodes_have_another(monkeypatch):
    monkeypatch.setattr(readiness, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"not installed: vllm, deepspeed: .*neither kernels nor flash-attn is installed"):
        checked("paper", "", "generic nodes=8")
    assert checked("paper", "", "container nodes=8")["recipe"] == "paper"
