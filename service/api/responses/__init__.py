"""OpenAI's responses: schema, routes, stream and body."""
