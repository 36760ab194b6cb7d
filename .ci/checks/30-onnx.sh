#!/usr/bin/env bash
# Networks exported as ONNX give ONNX Runtime's results: the test of tests/onnx.rs with the packages that it needs.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${FARFACE_PYTHON:-}
if [ -z "$python" ]; then
    venv=target/onnx-venv
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet numpy onnx onnxruntime safetensors
    python=$PWD/$venv/bin/python
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
FARFACE_PYTHON=$python cargo test --locked --test onnx -- --nocapture 2>&1 | tee "$log"
! grep -q "^skipped: python3" "$log"
