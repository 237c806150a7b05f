"""Benchmarks on a GPU beside their peers; `benchmarks/gpu_check.sh` runs all of them. Imported as `gpu`, with `benchmarks` on the path."""
