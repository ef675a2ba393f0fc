"""Commands: a mode of launch.py a file."""
