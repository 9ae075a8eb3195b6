"""For tests of backends: a float64 oracle, comparison outside a margin band, random networks."""
