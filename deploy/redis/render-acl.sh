#!/bin/sh
# Writes Redis' access list: $1 is the file, REDIS_PASSWORD the password, of which only a hash is
# kept. Nobody is `default`; `quire` may touch its own keys and channels and change no configuration;
# `probe` may ask whether the server answers.
set -eu
hash=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
umask 077
cat >"$1" <<LIST
user default off
user quire on #$hash ~quire:* &quire:* +@all -@admin -@dangerous +info
user probe on nopass resetkeys resetchannels -@all +ping
LIST
