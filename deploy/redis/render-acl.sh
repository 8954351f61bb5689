#!/bin/sh
# Writes Redis' access list: $1 is the file, REDIS_PASSWORD the password, of which only a hash is
# kept. Nobody is `default`; `quire` may touch its own keys and channels and change no configuration;
# `probe` may ask whether the server answers. If $2 is `cluster`, `replica` may copy what a server has,
# and `cluster` make a Redis Cluster of several servers.
set -eu
hash=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
umask 077
cat >"$1" <<LIST
user default off
user quire on #$hash ~quire:* &quire:* +@all -@admin -@dangerous +info
user probe on nopass resetkeys resetchannels -@all +ping
LIST
[ "${2:-}" = cluster ] || exit 0
cat >>"$1" <<LIST
user replica on #$hash resetkeys resetchannels -@all +psync +replconf +ping
user cluster on #$hash resetkeys resetchannels -@all +cluster +info +ping
LIST
