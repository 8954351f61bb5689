"""Text: tokenizers and chat templates. Torch-free."""
