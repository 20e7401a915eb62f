"""Other libraries at work on the families' models, held against us: `make test-clients`."""
