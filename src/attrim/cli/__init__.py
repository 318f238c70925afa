"""The command line: one file a command. Nothing here is needed by the library."""
