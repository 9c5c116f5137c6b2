"""What lowbit must reach, measured: `python -m benchmarks`, or one page at a time, `python -m benchmarks.latency`."""
