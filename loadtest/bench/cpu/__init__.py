"""The CPU benchmark: `python -m loadtest.bench.cpu --help` lists its subcommands."""
