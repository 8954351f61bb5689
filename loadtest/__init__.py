"""Load tests: what a user of the HTTP API sees. Imports nothing of the server's own code."""
