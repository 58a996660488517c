"""Every option of every command. Imports nothing heavy, so that `--help` is quick."""
