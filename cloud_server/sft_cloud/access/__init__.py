"""Who calls: tokens, certificates, and the interceptor that lets nobody else in."""
