"""Metrics, logs and traces. Each implements the observers of the parts it observes."""
