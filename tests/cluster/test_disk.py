"""Disk that a recipe fills, against a checkpoint that was saved; under ZeRO see tests/pipeline/test_zero.py."""

import pytest

from lwzlib.cluster.disk import checkpoint_gb, checkpoints, disk
from lwzlib.cluster.plan_pages import planned

PAPER = planned("paper")


def test_a_checkpoint_is_as_large_as_one_that_was_saved(alone):
    checkpoint = alone.folder / "checkpoints" / alone.status["checkpoint"]
    saved = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    p = planned("smoke", ["vllm.mode=none"])
    assert checkpoint_gb(p).value * 1e9 == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize(("sets", "step_s", "count"), [
    ("grpo.steps=100 grpo.checkpoint_every_steps=25 distributed.checkpoint_every_minutes=0", 800, 4),
    ("grpo.steps=100 grpo.checkpoint_every_steps=100 distributed.checkpoint_every_minutes=120", 800, 12),  # each ninth step
    ("grpo.steps=25 grpo.checkpoint_every_steps=25 distributed.checkpoint_every_minutes=120", 800, 3),  # 9, 18, 25
    ("grpo.steps=50 grpo.checkpoint_every_steps=25 distributed.checkpoint_every_minutes=120", 10, 2)])
def test_checkpoints_are_written_by_steps_and_by_the_clock(sets, step_s, count):
    assert checkpoints(planned("paper", sets), step_s) == count


def test_disk_counts_what_every_run_keeps():
    lines = {line.name: line for line in disk(PAPER)}
    assert lines["grpo: checkpoints"].value == pytest.approx(3 * 2 * 32.76 * 14, rel=0.001)
    assert lines["a third one"].value == pytest.approx(72.71 * 14, rel=0.001)
    assert lines["grpo: snapshots"].value == pytest.approx(3 * 5 * 32.76 * 2, rel=0.001)
    assert lines["models"].value == pytest.approx((32.76 * 6 + 72.71) * 2, rel=0.001)
    twice = {line.name: line.value for line in disk(planned("paper", "evaluation.every_steps=15"))}
    assert twice["grpo: snapshots"] == pytest.approx(lines["grpo: snapshots"].value * 9 / 5)
