"""How any client reaches a server, shows who it is, and asks it something that changes nothing."""
