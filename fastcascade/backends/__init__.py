"""Backends, which lower a plan to a program: CPU kernels, GPU kernels, plain torch."""
