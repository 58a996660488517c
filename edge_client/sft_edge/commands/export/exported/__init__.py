"""Code that runs where this package is not installed."""
