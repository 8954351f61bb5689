#!/bin/sh
# Makes a Redis Cluster of the servers <service>-0, <service>-1, ..., each primary with one replica. Run
# it once, in any of them: $1 is their number, $2 the Service; REDIS_PASSWORD is the password, and REDIS_PORT the
# port if it is another one.
set -eu
nodes=
for number in $(seq 0 $(($1 - 1))); do
  address=$(getent hosts "$2-$number.$2" | cut -d ' ' -f 1)
  nodes="$nodes $address:${REDIS_PORT:-6379}"
done
# shellcheck disable=SC2086
REDISCLI_AUTH=$REDIS_PASSWORD redis-cli --user cluster --no-auth-warning \
  --cluster create $nodes --cluster-replicas 1 --cluster-yes
