"""Tensor parallelism: several processes, each with a share of every layer, answer as one runner.

shares     what a rank holds and computes, how ranks meet and sum
runner     the leader's runner, the follower's loop
wire       a batch as bytes, from the leader to the followers
ranks      starts the followers, watches them, ends them
follower   a follower as a process
"""
