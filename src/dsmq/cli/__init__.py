"""The command line. `main` runs the commands that use a server; `parser` reads the options of all of them."""
