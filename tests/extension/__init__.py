"""One path, one loss, one critic and one agent from outside the package, each a file, as a user's."""
