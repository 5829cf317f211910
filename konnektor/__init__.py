"""Many streams over one mutual-TLS connection that a worker dials out."""
