"""Command lines from dataclasses, how a command ends, and what it says of the machine."""
