"""What differs from one architecture to the next: a small file a family."""
