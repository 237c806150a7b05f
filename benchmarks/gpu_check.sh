#!/usr/bin/env bash
# Builds the CUDA library for the GPU of this machine, tests the kernels on it, and measures them beside their peers, in under 9 minutes.
#   benchmarks/gpu_check.sh [--out FOLDER] [--wheels FOLDER] [--minutes 9] [--only STEP,...] [--dry-run]
# Needs Python with torch, triton, numpy, pytest and pybind11, and cmake and nvcc; no network. Without a GPU it does what can be done.
# FOLDER/gpu_check.json has everything, FOLDER/gpu_check.txt the table. Exit code: 0 all steps passed, 1 some did not, 2 usage.
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec "${PYTHON:-python3}" -m gpu.check "$@"
