#!/bin/sh
# CUDA without a GPU: every kernel compiles by NVRTC from PyPI and none spills; kernels are embedded by the same NVRTC; the emulated
# driver and all that runs on it, under AddressSanitizer and UndefinedBehaviorSanitizer.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip download --quiet --no-deps --dest "$work" nvidia-cuda-nvrtc-cu11
python3 -m zipfile -e "$work"/nvidia_cuda_nvrtc_cu11-*.whl "$work/nvrtc"
# The test program that `cargo test` has built.
tests=$(cargo test --locked --test cuda --no-run 2>&1 | sed -n 's/.*(\(.*\/cuda-[0-9a-f]*\)).*/\1/p')
[ -x "$tests" ]

# Meanwhile, since most of either keeps one processor busy. What the bare library does with kernels in it is tested where it is
# built with the feature: `--test cuda embedded::`.
(
    set -e
    python3 tests/cuda/compile.py "$work/nvrtc"
    FARFACE_CUDA_PATH=$(dirname "$(find "$work/nvrtc" -name 'libnvrtc.so*' | head -n 1)") \
        cargo check --locked --no-default-features --features cuda-embedded
) >"$work/kernels.log" 2>&1 &
kernels=$!

# The emulated driver built anew with the sanitizers, on what shows them most.
failed=0
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
env FARFACE_TEST_SANITIZE=1 LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 "$tests" --test-threads 2 \
    stem_convolution depthwise pooling resizing roi_align pixels:: every_detectors_maps recorded_launches \
    candidates_without_room threads_share a_picture_on_the_device tiles:: objective::an_objective objective::ties \
    two_step::an_objective second_look::feature second_look::grouped gradients::convolutions_trained || failed=1
wait "$kernels" || failed=1
cat "$work/kernels.log"
exit "$failed"
