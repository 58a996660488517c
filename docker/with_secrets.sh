#!/bin/sh
# For docker compose: makes, once, what lets its edge know the cloud and be let in, then runs the command it is given.
# SFT_CLOUD_SECRETS and SFT_EDGE_SECRETS are directories: what only the cloud may read, and what the edge gets.
set -eu
umask 077

if [ ! -e "$SFT_EDGE_SECRETS/token" ]; then
  # Nothing is half made: what an interrupted start has left is made again.
  rm -f "$SFT_CLOUD_SECRETS"/*.pem "$SFT_CLOUD_SECRETS/tokens.json"
  sft-cloud certs init --dir "$SFT_CLOUD_SECRETS" --host cloud --days 3650
  rm "$SFT_CLOUD_SECRETS/ca-key.pem" # nothing else is to be signed with it
  cp "$SFT_CLOUD_SECRETS/ca.pem" "$SFT_EDGE_SECRETS/ca.pem"
  sft-cloud token create --tokens "$SFT_CLOUD_SECRETS/tokens.json" --name edge --expires 0s > "$SFT_EDGE_SECRETS/token.new"
  mv "$SFT_EDGE_SECRETS/token.new" "$SFT_EDGE_SECRETS/token"
fi

exec "$@"
