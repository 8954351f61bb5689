"""Endpoints about the server: health, models, tokenizer, page, status, attention, documents."""
