"""Ways to run a plan; each backend lowers it to a program."""
