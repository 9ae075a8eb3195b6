"""What a cascade achieves: accuracy and cost, thresholds for a target, guarantees, curves."""
