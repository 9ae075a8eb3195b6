"""Lowering of a cascade to a plan: export, translation to operations, fusion, the plan and its files."""
