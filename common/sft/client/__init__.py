"""How any client reaches a server, shows who it is, asks what changes nothing, and understands a refusal."""
