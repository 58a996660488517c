"""The paper's three systems behind one interface: where Algorithm 1 is on the edge."""
