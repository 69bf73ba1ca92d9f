#!/bin/bash
# Runs the runtime from this clone, as the current user and on loopback: `make run`, after `make release`.
#
# Everything it keeps is in .runtime/: the gateway's home, the runtime's state, the store, the token.
# Every RUNTIME_* setting can be overridden from the environment. Ctrl-C ends it with a final snapshot.
set -eu
cd "$(dirname "$0")/.."

here=$PWD/.runtime
export RUNTIME_LISTEN=${RUNTIME_LISTEN:-127.0.0.1:8080}
export RUNTIME_ROOT=${RUNTIME_ROOT:-$here/data}
export RUNTIME_STATE=${RUNTIME_STATE:-$here/state}
export RUNTIME_STORE=${RUNTIME_STORE:-file://$here/store}
export RUNTIME_SERVICE_TOKEN_FILE=${RUNTIME_SERVICE_TOKEN_FILE:-$here/token}
export RUNTIME_GATEWAY_URL=${RUNTIME_GATEWAY_URL:-http://127.0.0.1:18789}
export RUNTIME_GATEWAY_USER=${RUNTIME_GATEWAY_USER:-$(id -un)}
export RUNTIME_GATEWAY_PREPARE=${RUNTIME_GATEWAY_PREPARE:-$PWD/gateway/prepare.mjs}
# The token comes from its file, and the gateway's files belong under RUNTIME_ROOT, whatever this shell uses otherwise.
unset RUNTIME_SERVICE_TOKEN OPENCLAW_HOME OPENCLAW_STATE_DIR OPENCLAW_CONFIG_PATH OPENCLAW_PROFILE

api=${RUNTIME_LISTEN/#0.0.0.0:/127.0.0.1:}
gateway_port=${RUNTIME_GATEWAY_URL##*:}

listens() { (exec 3<>"/dev/tcp/${1%:*}/${1##*:}") 2>/dev/null; }

if listens "$api"; then
    echo "$api is in use; choose another address, for example: RUNTIME_LISTEN=127.0.0.1:8081 make run" >&2
    exit 1
fi
if listens "127.0.0.1:$gateway_port"; then
    echo "port $gateway_port is in use; choose another, for example: RUNTIME_GATEWAY_URL=http://127.0.0.1:18889 make run" >&2
    exit 1
fi

installed=$(gateway/install.sh)
export PATH="$installed/bin:$PATH"

umask 077
mkdir -p "$here" "$RUNTIME_ROOT" "$RUNTIME_STATE"
if [ ! -s "$RUNTIME_SERVICE_TOKEN_FILE" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$here/token.new"
    mv "$here/token.new" "$RUNTIME_SERVICE_TOKEN_FILE"
fi
# curl reads the header from this file, so the token shows neither on the screen nor in the process list.
header=$here/authorization
printf 'Authorization: Bearer %s\n' "$(cat "$RUNTIME_SERVICE_TOKEN_FILE")" >"$header"

greet() {
    until listens "$api"; do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    cat <<GREETING

The API answers on http://$api. Ctrl-C stops everything, with a final snapshot. From another terminal:

  curl -H @$header http://$api/v1/status
  curl -H @$header -X POST http://$api/v1/backup
  curl -H @$header -X POST http://$api/v1/restart
  curl -H @$header http://$api/v1/devices
  curl -H @$header -X POST http://$api/v1/devices/REQUEST_ID/approve

GREETING
}
# Twice in the background: the supervisor takes this process over, and must not find a child that it did not start.
(greet $$ &)

exec dist/supervisor
