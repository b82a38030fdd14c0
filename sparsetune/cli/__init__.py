"""The command line: each command translates options into a configuration and calls the library."""
