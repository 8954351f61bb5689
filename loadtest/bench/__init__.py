"""Benchmarks: tables of figures, Quire beside its peers, each a script."""
