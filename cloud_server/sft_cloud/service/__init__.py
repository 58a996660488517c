"""The RPCs, and what the server knows of a session beside net_2: whose it is, who has it, what it has answered."""
