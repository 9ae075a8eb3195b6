"""Files that survive crashes, and dataclasses as JSON."""
