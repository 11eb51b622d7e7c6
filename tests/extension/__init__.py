"""A path, a loss, a critic and an agent from outside the package, each in one file."""
