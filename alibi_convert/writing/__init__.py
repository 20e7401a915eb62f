"""How what is written appears whole or not at all, is known by its hashes, and says its origin."""
