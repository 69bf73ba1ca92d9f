#!/bin/sh
# Installs the S3 server of the tests into a cache folder, once, and prints the path of its program.
# Needs Python 3 with venv. Standard output carries the path and nothing else.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
pins=$(sha256sum <"$here/requirements.txt" | cut -c1-16)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/openclaw-runtime/moto-$pins

mkdir -p "$dir"
# One installer at a time. The stamp is written last, so an interrupted run is seen and done again.
exec 9>"$dir/.lock"
flock 9
if [ ! -e "$dir/.installed" ]; then
    echo "installing the tests' S3 server into $dir" >&2
    python3 -m venv --clear "$dir/venv" >&2
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt" >&2
    "$dir/venv/bin/pip" --disable-pip-version-check check >&2
    touch "$dir/.installed"
fi
echo "$dir/venv/bin/moto_server"
