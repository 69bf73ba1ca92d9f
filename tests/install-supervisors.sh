#!/bin/sh
# Unpacks the peers of the supervisor's benchmark into a cache folder, once, and prints the folder of their programs, to be
# put in front of PATH. Needs Debian 12's apt and Python 3 with venv. Nothing is installed: no service of theirs starts.
set -eu

packages='s6 libs6-2.11 libskarnet2.13 libexecline2.9 runit tini'
supervisord=4.3.0
dir=${XDG_CACHE_HOME:-$HOME/.cache}/openclaw-runtime/supervisors-$(echo "$packages $supervisord" | sha256sum | cut -c1-16)

mkdir -p "$dir/bin"
exec 9>"$dir/.lock"
flock 9
if [ ! -e "$dir/.installed" ]; then
    echo "unpacking the peers of the benchmark into $dir" >&2
    mkdir -p "$dir/debs" "$dir/root"
    # shellcheck disable=SC2086 # a list of words
    (cd "$dir/debs" && { apt-get --quiet=2 download $packages || { apt-get --quiet=2 update && apt-get --quiet=2 download $packages; }; }) >&2
    for deb in "$dir/debs"/*.deb; do dpkg-deb -x "$deb" "$dir/root"; done
    # Their libraries are found beside them; the links of s6 to itself are resolved by its own path.
    for program in "$dir"/root/bin/s6* "$dir"/root/usr/bin/s6* "$dir"/root/usr/bin/run* "$dir"/root/usr/bin/sv "$dir"/root/usr/bin/tini; do
        [ -f "$program" ] || continue
        name=$(basename "$program")
        ln -sf "$program" "$dir/bin/$name"
    done
    python3 -m venv --clear "$dir/venv" >&2
    "$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "supervisor==$supervisord" >&2
    ln -sf "$dir/venv/bin/supervisord" "$dir/bin/"
    rm -rf "$dir/debs"
    touch "$dir/.installed"
fi
echo "$dir/bin"
