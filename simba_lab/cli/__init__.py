"""The command line: parsing and printing only. ``main`` is the frame, each other module is one command."""
