#!/bin/sh
# CUDA without a GPU: every kernel compiles by NVRTC from PyPI and none spills; the emulated driver and all that runs on it, under
# AddressSanitizer and UndefinedBehaviorSanitizer.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip download --quiet --no-deps --dest "$work" nvidia-cuda-nvrtc-cu11
python3 -m zipfile -e "$work"/nvidia_cuda_nvrtc_cu11-*.whl "$work/nvrtc"
python3 tests/cuda/compile.py "$work/nvrtc"
