"""Command lines from dataclasses, and how a command ends."""
