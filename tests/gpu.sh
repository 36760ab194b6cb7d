#!/bin/sh
# All that wants a GPU, in one go.
#
#   tests/gpu.sh build [FOLDER]   makes stripped programs (x86-64) in FOLDER, target/gpu where none is named; needs Rust, no GPU
#   tests/gpu.sh run [FOLDER]     runs them on a machine with an NVIDIA driver and PyTorch, which needs neither Rust nor a network
#
# A run takes some minutes: parity of layers, networks and detectors with the CPU, compute-sanitizer where it is installed, time of
# every step, our networks against PyTorch, detection from pictures in host memory. It goes on where a part fails; the last line counts.
set -u
cd "$(dirname "$0")/.."
folder=${2:-target/gpu}

build() {
    set -e
    target=${CARGO_TARGET_DIR:-target}
    mkdir -p "$folder"
    cargo build --release --locked --bin farface --example cuda_worker
    tests=$(cargo test --release --locked --test cuda --no-run 2>&1 | tee /dev/stderr |
        sed -n 's/.*(\(.*\/cuda-[0-9a-f]*\)).*/\1/p')
    cp "$tests" "$folder/cuda-tests"
    cp "$target/release/farface" "$target/release/examples/cuda_worker" "$folder"
    cp tests/bench/cuda_compare.py "$folder"
    strip "$folder/cuda-tests" "$folder/farface" "$folder/cuda_worker"
    du -sh "$folder"
}

passed=0
failed=0
step() { # name, command...
    name=$1
    shift
    printf '\n== %s\n' "$name"
    start=$(date +%s)
    if "$@"; then
        passed=$((passed + 1))
        echo "== passed: $name ($(($(date +%s) - start)) s)"
    else
        failed=$((failed + 1))
        echo "== FAILED: $name ($(($(date +%s) - start)) s)"
    fi
}

# Networks that are compared, with the sizes of their inputs.
networks="fpn-finest-r50@800x800 fpn-finest-r18@800x800 refineface-r18@640x480 refineface-r50@640x480
    refineface-r152@640x480 hambox-r50@640x480 farface-nano@640x480 farface-nano@1920x1080
    farface-small@640x480 farface-small@1920x1080"

# Those whose training is compared.
trained="fpn-finest-r50@640x640 farface-nano@320x320"

describe() {
    mkdir -p "$folder/networks" "$folder/trained"
    for network in $trained; do
        "$folder/cuda_worker" --describe "$folder/trained/$network" "${network%@*}" || return 1
    done
    for network in $networks; do
        "$folder/cuda_worker" --describe "$folder/networks/$network" "${network%@*}" || return 1
    done
}

layers() { # NETWORK@WxH
    size=${1#*@}
    "$folder/cuda_worker" --layers "${1%@*}" "${size%x*}" "${size#*x}" 1 f16
}

run() {
    # Where pip has put NVIDIA's libraries.
    FARFACE_CUDA_PATH=$(python3 -c 'import glob, site, sys
folders = site.getsitepackages() + [site.getusersitepackages()] + sys.path
print(":".join(sorted({p for f in folders for p in glob.glob(f + "/nvidia/*/lib")})))')
    export FARFACE_CUDA_PATH FARFACE_TEST_CUDA=device
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv
    step "parity of our kernels" env FARFACE_CUDA_CONV=own "$folder/cuda-tests" --test-threads 1
    step "parity of the fastest" env FARFACE_CUDA_CONV=auto "$folder/cuda-tests" --test-threads 1 kernels:: fusion:: random:: sessions::
    step "parity of cuDNN" env FARFACE_CUDA_CONV=cudnn "$folder/cuda-tests" --test-threads 1 kernels::dense_convolution
    step "training by the fastest" env FARFACE_CUDA_CONV=auto "$folder/cuda-tests" --test-threads 1 train:: trainer::
    step "training by cuDNN" env FARFACE_CUDA_CONV=cudnn "$folder/cuda-tests" --test-threads 1 --nocapture train:: trainer:: gradients::
    step "parity of cuBLASLt" env FARFACE_CUDA_CONV=cublaslt "$folder/cuda-tests" --test-threads 1 kernels::dense_convolution
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck; do
            step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/cuda-tests" --test-threads 1 \
                stem_convolution dense_convolution tiles:: pooling resizing recorded_launches objective:: train:: sessions
        done
    else
        echo "skipped: compute-sanitizer not found"
    fi
    step "steps of farface-nano" layers farface-nano@640x480
    step "steps of fpn-finest-r50" layers fpn-finest-r50@800x800
    step "networks for PyTorch" describe
    step "against PyTorch" python3 "$folder/cuda_compare.py" --ours "$folder/cuda_worker" --compile "$folder/networks"
    step "training against PyTorch" python3 "$folder/cuda_compare.py" --ours "$folder/cuda_worker" --compile --train \
        --batches 8 -- "$folder/trained"
    step "detection" "$folder/farface" bench --device cuda:0 --size 640x480 --size 1920x1080 --nv12 --runs 200
    printf '\n%s passed, %s failed\n' "$passed" "$failed"
    [ "$failed" -eq 0 ]
}

case ${1:-} in
build) build ;;
run) run ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
