"""The command line: flags, help, and what the commands print."""
