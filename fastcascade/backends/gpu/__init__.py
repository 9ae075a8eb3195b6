"""GPU backends: one breadth-first schedule, and a choice of runners for each stage."""
