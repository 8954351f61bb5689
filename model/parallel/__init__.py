"""Tensor parallelism: several processes, each with a share of every layer, act as one runner.

shares     what a rank holds and computes, how ranks connect and sum
runner     the leader's runner, the follower's loop
wire       a batch as bytes, from the leader to the followers
ranks      starts, watches and ends the followers
follower   a follower as a process
"""


class RankLost(Exception):
    """A rank ended. What the others compute is invalid from then on."""
