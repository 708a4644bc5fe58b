#!/usr/bin/env bash
# Measure the kit on one GPU (see benchmarks/gpu.py). The GPU machine needs Python 3.11, torch with CUDA, and no network.
#
#   bash benchmarks/gpu.sh bundle       here, with network: wheels and the kit's models into benchmarks/bundle
#   bash benchmarks/gpu.sh run          there: install them beside torch, measure, write figures/results/gpu.csv
#   bash benchmarks/gpu.sh dry FOLDER   anywhere: the same measurements in small on a random model, into FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=benchmarks/bundle

case "${1:-}" in
bundle)
    mkdir -p "$bundle/wheels"
    # What the kit needs and its needs, as installed here; torch and what belongs to it is the GPU machine's own.
    python benchmarks/closure.py trl accelerate peft datasets transformers sentence-transformers gguf pydantic pyyaml regex \
        scipy pandas typer rich xxhash httpx tenacity py3langid psutil pip > "$bundle/requirements.txt"
    python -m pip download --quiet --no-deps --only-binary :all: -d "$bundle/wheels" -r "$bundle/requirements.txt"
    python -m lwzlib.cli.main prepare
    cp -rL "${LWZ_CACHE:-$HOME/.cache/lwzlib}" "$bundle/cache"
    du -sh "$bundle"
    ;;
run)
    wrong=()
    command -v git >/dev/null || wrong+=("no git: the rows would not name their commit (apt-get install git)")
    [ -n "${CC:-}" ] || command -v gcc >/dev/null || command -v clang >/dev/null ||
        wrong+=("no C compiler, which Triton wants (apt-get install gcc)")
    header=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
    [ -f "$header" ] || wrong+=("no $header, which Triton wants (apt-get install python3-dev)")
    gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
    [ "$gpus" -lt 2 ] || [[ ${CUDA_VISIBLE_DEVICES:-,} != *,* ]] ||
        wrong+=("$gpus GPUs are visible, and TRL takes one in one process: set CUDA_VISIBLE_DEVICES=0")
    if [ ${#wrong[@]} -gt 0 ]; then
        printf 'gpu.sh: %s\n' "${wrong[@]}" >&2
        exit 2
    fi
    if [ -d "$bundle" ]; then
        [ -x .venv-gpu/bin/python ] || python3 -m venv --system-site-packages .venv-gpu
        .venv-gpu/bin/python -m pip install --quiet --no-index --no-deps --find-links "$bundle/wheels" -r "$bundle/requirements.txt"
        export PATH="$PWD/.venv-gpu/bin:$PATH" LWZ_CACHE="$PWD/$bundle/cache"
    fi
    HF_HUB_OFFLINE=1 PYTHONPATH="$PWD" python benchmarks/gpu.py
    ;;
dry)
    HF_HUB_OFFLINE=1 PYTHONPATH="$PWD" python benchmarks/gpu.py --dry --folder "${2:?a folder}/runs" --out "$2/gpu.csv"
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
