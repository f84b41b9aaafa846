"""Side-by-side measurements; each module is a command of its own, `python -m benchmarks.<name>`."""
