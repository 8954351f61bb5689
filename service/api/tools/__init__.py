"""Tool calls: prompt, grammar, and the parser of what the model writes."""
