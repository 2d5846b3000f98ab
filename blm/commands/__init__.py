"""Commands that need no run folder, one file a subject; `cli.py` lists them."""
