"""The `alibi` command, on top of all other packages."""
