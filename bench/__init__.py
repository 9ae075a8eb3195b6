"""Benchmarks of this repository: the engine, its peers, and the targets.

Not installed with the package; run from a checkout as ``python -m bench.run`` or through ``make bench``.
"""
