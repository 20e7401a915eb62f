"""The proof: both backends against the specification, on every device that is present."""
