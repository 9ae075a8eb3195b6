"""Atomic writes, bundles of JSON and tensors, and dataclasses as JSON."""
