"""What the operator sees: figures, spans, the log, the audit log."""
