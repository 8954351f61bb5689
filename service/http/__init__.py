"""The HTTP server below the routes: sockets, connection limits, request parsing, draining."""
