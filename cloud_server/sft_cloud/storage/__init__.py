"""Bytes that outlive a process: uploads by hash, halves of checkpoints, a directory or an object store below."""
