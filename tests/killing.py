"""SIGKILL a stage in a process of its own at given moments, and then let it end."""

import subprocess
import sys
import time

from lwzlib.pipeline.stages import stage_run


def killed_then_finished(stage, recipe, root, moments, arm=None):
    """The Run. `moments`: for each kill a function of the Run, true when it is time. Fails if the stage ends before a kill."""
    run = stage_run(stage, recipe, root, 0, arm)
    root.mkdir(parents=True, exist_ok=True)
    (root / "asked.yaml").write_text(recipe.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "lwzlib.cli.main", "stage", stage, str(root / "asked.yaml"), "--run-dir", str(root)]
    command += ["--arm", arm] if arm else []
    for is_time in [*moments, None]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while is_time and process.poll() is None and not is_time(run):
            time.sleep(0.005)
        if is_time:
            assert process.poll() is None, f"the run ended before it could be killed: {process.stderr.read().decode()[-2000:]}"
            process.kill()
        said = process.stderr.read().decode()  # ends when nothing that it started is left
        assert process.wait() == (-9 if is_time else 0), said[-2000:]
    return run


def at_step(step):
    return lambda run: run.status.get("step", 0) >= step
