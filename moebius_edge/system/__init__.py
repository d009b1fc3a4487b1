"""The machine and its files: atomic writing, what hardware is there, child processes."""
