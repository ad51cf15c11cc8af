"""Micro-benchmarks: ``python -m benchmarks`` measures the ops on this machine."""
