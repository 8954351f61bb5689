"""The rig: a Redis, engines and API replicas as processes of one machine, clients and a checker.

The fault tests and the soak harm it and then check every answer. Unlike the rest of `loadtest` it
reads the journal, with the service's own code. It knows the oracle only as a program to start.
"""
