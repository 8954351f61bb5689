"""Structured output: schemas, grammars and their validation under limits."""
