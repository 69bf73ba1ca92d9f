#!/bin/sh
# Removes from an installed gateway what no process of it ever reads: about a quarter of it. Only the image does this;
# `make run` and the tests use the packages as npm installs them.
# Usage: gateway/prune.sh NODE_MODULES
#
# OpenClaw's own package is left whole: it carries the hashes of its files, checks them when it updates itself, and sends
# parts of itself to other machines.
set -eu

cd "$1"
# As npm places it; elsewhere it would be pruned like any other package.
[ -f openclaw/openclaw.mjs ] || {
    echo "prune: there is no openclaw in $1" >&2
    exit 1
}

# Removes what find(1) finds in the other packages.
prune() {
    find . -path ./openclaw -prune -o "$@" -exec rm -rf {} +
}

# Source maps: Node.js reads them only with --enable-source-maps.
prune -type f -name '*.map'
# TypeScript: declarations are for compilers, and OpenClaw runs its own compiler without libraries or resolution. Node.js runs
# no TypeScript below node_modules, and entries name it only under the condition `source`, which nothing sets.
prune -type f \( -name '*.ts' -o -name '*.mts' -o -name '*.cts' -o -name '*.tsbuildinfo' \)
# Packages' own tests and examples, where package.json is: a folder of that name further down may be code.
prune -type d \( -name test -o -name tests -o -name __tests__ -o -name example -o -name examples \) \
    -exec test -f '{}/../package.json' \; -prune
# What native code was built from.
prune -type f \( -name '*.c' -o -name '*.cc' -o -name '*.h' -o -name '*.hh' -o -name '*.gyp' \)

# Of the TypeScript compiler OpenClaw calls the library. These are its command line, an editor's server and translations.
rm -rf typescript/bin typescript/lib/_*.js typescript/lib/tsc.js typescript/lib/tsserver.js typescript/lib/typingsInstaller.js \
    typescript/lib/watchGuard.js typescript/lib/*/diagnosticMessages.generated.json .bin/tsc .bin/tsserver

# The driver for desktops of OpenClaw's experimental cua-computer plugin: its library wants X11's, which the image lacks as
# it lacks a display, so it cannot be loaded.
rm -rf @trycua/cua-driver-linux-*

# Native code of other platforms, which these two packages carry for all at once.
rm -rf @koromix/koffi-linux-*/musl_* @earendil-works/pi-tui/native/darwin @earendil-works/pi-tui/native/win32
