"""The command line, `paceline`."""
