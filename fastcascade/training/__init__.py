"""Fitting a cascade: the training loop, its losses, checkpoints, and runs described by a TOML file."""
