"""The engine: sequences, blocks, scheduling, text. Ints and bytes; tensors only in `pack`."""
