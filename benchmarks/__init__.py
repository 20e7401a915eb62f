"""One script per question; each writes what it measured, and on what, to `results/`."""
