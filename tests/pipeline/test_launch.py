"""Which processes are started for which stages, and with what in their environment."""

import os
import subprocess
import sys

import pytest
from smoke_runs import ARM

from lwzlib.base.processes import tcmalloc
from lwzlib.base.recipe import load_recipe
from lwzlib.pipeline import launch
from lwzlib.pipeline.stages import places


@pytest.fixture
def started(monkeypatch):
    """The stages of each process that would be started; its runs are finished at once."""
    processes = []

    def do(command, runs, *spread):
        processes.append(command[command.index("stage") + 1])
        for run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.update(state="finished")

    monkeypatch.setattr(launch, "_do", do)
    return processes


def test_stages_share_a_process_unless_vllm_is_colocated(smoke, tmp_path, started):
    alone, beside = (load_recipe("smoke", f"launch=subprocess vllm.mode={mode}") for mode in ("none", "colocate"))
    arm = "continual-pretrain-think"  # it needs what another arm writes
    launch.launch_arm(alone, tmp_path / "alone", 0, arm)
    assert started == ["samples-before,grpo,samples-during,samples-after"]
    started.clear()
    launch.launch_arm(beside, tmp_path / "beside", 0, arm)
    ordered = [stage for of, stage in places(beside) if of in ("", arm) or (of, stage) == (ARM, "grpo")]
    assert sorted(started) == sorted(ordered) and started.count("grpo") == 2
    started.clear()
    launch.launch("grpo", beside, tmp_path / "beside", 0, arm)
    assert not started


def test_memory_is_kept_only_where_no_gpu_is(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_GPU_DRIVER", tmp_path / "nvidiactl")
    monkeypatch.setattr(launch, "tcmalloc", lambda: "")
    assert {name for name in launch.of_processes() if name.startswith("MALLOC_")} == {
        "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}
    monkeypatch.setattr(launch, "tcmalloc", lambda: "libtcmalloc_minimal.so.4")
    assert launch.of_processes() == {
        "GOMP_SPINCOUNT": "10000", "LD_PRELOAD": "libtcmalloc_minimal.so.4"} | launch._KEEPS_MEMORY
    (tmp_path / "nvidiactl").touch()
    assert launch.of_processes() == {"GOMP_SPINCOUNT": "10000"}


def test_what_was_preloaded_stays_so_and_nothing_is_preloaded_twice(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "mine.so")
    once = launch.preloading("libtcmalloc_minimal.so.4")
    monkeypatch.setenv("LD_PRELOAD", once["LD_PRELOAD"])
    assert once == launch.preloading("libtcmalloc_minimal.so.4") == {"LD_PRELOAD": "libtcmalloc_minimal.so.4:mine.so"}


@pytest.mark.skipif(not tcmalloc(), reason="needs tcmalloc: apt-get install libtcmalloc-minimal4")
def test_a_stage_starts_with_the_allocator_that_is_there():
    seen = subprocess.run([sys.executable, "-c", "print(open('/proc/self/maps').read())"], capture_output=True, text=True,
                          env=os.environ | launch.preloading(tcmalloc()), check=True)
    assert tcmalloc().split(".so")[0] in seen.stdout and not seen.stderr
