#!/bin/sh
# Installs the peers of the backup benchmark into a cache folder, once, and prints the folder of their programs, to be put
# in front of PATH. Needs Debian's apt and Python 3 with venv. Standard output carries the path and nothing else.
set -eu

# Debian's stable release has one of years ago. When this version has left the archive, take the one that it has.
restic=0.19.1-1
suite=sid

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
pins=$({ cat "$here/peers.txt"; echo "$restic"; } | sha256sum | cut -c1-16)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/openclaw-runtime/peers-$pins

# An apt of its own: the system's sources, lists and packages stay as they are.
fetch() {
    apt-get --quiet=2 \
        -o Dir::Etc::SourceList="$dir/apt/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State="$dir/apt/state" -o Dir::State::Status=/dev/null -o Dir::Cache="$dir/apt/cache" \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::Languages=none -o APT::Sandbox::User=root "$@" >&2
}

mkdir -p "$dir/apt/state/lists/partial" "$dir/apt/cache/archives/partial" "$dir/bin"
# One installer at a time. The stamp is written last, so an interrupted run is seen and done again.
exec 9>"$dir/.lock"
flock 9
if [ ! -e "$dir/.installed" ]; then
    echo "installing the peers of the benchmark into $dir" >&2
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    # The mirror that this system uses anyway.
    mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
    echo "deb [signed-by=$keys] $mirror $suite main" >"$dir/apt/sources.list"
    fetch update
    (cd "$dir/apt" && fetch download "restic=$restic")
    dpkg-deb -x "$dir/apt"/restic_*.deb "$dir/restic"
    python3 -m venv --clear "$dir/venv" >&2
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/peers.txt" >&2
    "$dir/venv/bin/pip" --disable-pip-version-check check >&2
    ln -sf "$dir/restic/usr/bin/restic" "$dir/venv/bin/aws" "$dir/venv/bin/rclone" "$dir/bin/"
    rm -rf "$dir/apt"
    touch "$dir/.installed"
fi
echo "$dir/bin"
