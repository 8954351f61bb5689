"""Load on any OpenAI-compatible server: `quire bench`, and the client of the load tests.

    sse.py         HTTP/1.1 and SSE over asyncio streams, cheap enough to share a machine
    client.py      streamed answers, timed and checked; open and closed loops
    workloads.py   synthetic prompts and arrival times
    dataset.py     prompts of a file
    run.py         the command: rates, goodput, table, JSON

Knows nothing of the server: it measures other people's, too.
"""
