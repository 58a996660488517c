"""What a person types: a file a command, a folder where one needs more."""
