"""Anthropic's messages: schema, routes, stream and body."""
