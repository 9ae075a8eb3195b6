"""Plans in the formats of other runtimes."""
