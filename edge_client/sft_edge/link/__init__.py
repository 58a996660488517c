"""The edge's end of one session, and the way there: the only room that sees gRPC."""
