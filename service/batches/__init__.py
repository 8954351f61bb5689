"""Files and batches: jobs of many requests that survive the process that runs them.

storage     a folder or a bucket, by fsspec: the only place where the state of a batch is
files       uploaded and written files, per tenant
batches     batches as immutable facts, whose union is the state
lines       the lines of an input file
runner      answers the lines of the batches whose lease in the queue a replica holds
"""
