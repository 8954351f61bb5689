"""OpenAI's completions and chat completions: schema, routes, stream and body."""
