"""The worker: moves requests from the queue to the engine and tokens to the journal."""
