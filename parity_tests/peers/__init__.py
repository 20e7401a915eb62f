"""What families of checkpoints are held against: their published formulas, in float64."""
