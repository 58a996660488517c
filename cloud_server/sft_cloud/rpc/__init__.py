"""What every room that sees gRPC shares of it: the table of status codes, and a handler around another."""
