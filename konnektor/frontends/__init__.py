"""How traffic gets into the tunnel: sans-I/O parsers, and their drivers."""
