"""The command line. `main` runs the commands that use a server; `parser` parses the options of all commands."""
