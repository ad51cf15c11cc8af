"""Decoding beside what people would otherwise take, in one run: ``python -m benchmarks.peers``."""
