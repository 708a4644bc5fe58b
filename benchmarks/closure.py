"""Print name==version of installed packages and of all they need here, without torch and what comes with it."""

import contextlib
import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WITH_TORCH = {"torch", "triton", "torchvision", "torchaudio"}


def closure(names: list[str]) -> dict[str, str]:
    found, todo = {}, [canonicalize_name(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found or name in WITH_TORCH or name.startswith(("nvidia-", "cuda-")):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another platform
            found[name] = importlib.metadata.version(name)
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


if __name__ == "__main__":
    print("\n".join(f"{name}=={version}" for name, version in sorted(closure(sys.argv[1:]).items())))
