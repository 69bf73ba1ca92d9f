#!/bin/sh
# Unpacks peers of the supervisor's benchmark into a cache folder, once, and prints the folder of their programs, to be put
# in front of PATH. Needs Debian's apt, Python 3 with venv and cargo. Nothing is installed, so no service of theirs starts. s6
# is not among them: it works from where Debian installs it only.
set -eu

packages='runit tini'
supervisord=4.3.0
horust=0.1.14
dir=${XDG_CACHE_HOME:-$HOME/.cache}/openclaw-runtime/supervisors-$(echo "$packages $supervisord $horust" | sha256sum | cut -c1-16)

mkdir -p "$dir/bin"
exec 9>"$dir/.lock"
flock 9
if [ ! -e "$dir/.installed" ]; then
    echo "unpacking the peers of the benchmark into $dir" >&2
    mkdir -p "$dir/debs" "$dir/root"
    # shellcheck disable=SC2086 # a list of words
    (cd "$dir/debs" && { apt-get --quiet=2 download $packages || { apt-get --quiet=2 update && apt-get --quiet=2 download $packages; }; }) >&2
    for deb in "$dir/debs"/*.deb; do dpkg-deb -x "$deb" "$dir/root"; done
    ln -sf "$dir/root/usr/bin/runsvdir" "$dir/root/usr/bin/runsv" "$dir/root/usr/bin/tini" "$dir/bin/"
    python3 -m venv --clear "$dir/venv" >&2
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "supervisor==$supervisord" >&2
    ln -sf "$dir/venv/bin/supervisord" "$dir/bin/"
    cargo install --quiet --locked --root "$dir" "horust@$horust" >&2
    rm -rf "$dir/debs"
    touch "$dir/.installed"
fi
echo "$dir/bin"
