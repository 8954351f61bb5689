"""What all dialects share: the request, its admission, and reading the answer back."""
