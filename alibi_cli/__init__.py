"""The `alibi` command: the only code that sits above both backends."""
