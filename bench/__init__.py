"""The benchmark: `make bench` measures against the floors. docs/benchmarks.md says what each row means."""
