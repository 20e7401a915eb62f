"""Writing: a destination appears whole or not at all, with hashes and a record of its origin."""
