"""Question benchmarks, one file each."""
