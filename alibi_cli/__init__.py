"""The `alibi` command, above everything else."""
