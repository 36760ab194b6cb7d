#!/usr/bin/env bash
# 64- and 32-bit Arm: builds and emulated tests.
set -euo pipefail
exec "$(dirname "$0")/../cross.sh"
