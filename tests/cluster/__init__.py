"""The test cluster: Redis, engines, API replicas as processes of one machine; clients; a checker.

Fault tests and the soak inject faults into it and then check every answer. It reads the journal
with the service's own code. The oracle engine is known to it only as a program to start.
"""
