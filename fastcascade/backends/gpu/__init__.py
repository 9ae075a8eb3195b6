"""GPU backends: one breadth-first schedule, several ways to run a stage."""
