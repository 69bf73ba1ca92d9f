#!/bin/bash
# Tests the container image on a Docker engine: `make e2e`, which builds it first. Usage: tests/image.sh [IMAGE]
#
# Most cases run a stand-in for the gateway, since they are about the container around it; two run the real one.
# Containers and volumes are named after this process, and removed whatever happens.
set -euo pipefail

image=${1:-openclaw-runtime}
prefix=openclaw-runtime-test-$$
token=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
# What docs/image.md says is enough.
capabilities=(--cap-drop ALL --security-opt no-new-privileges)
for name in SETUID SETGID CHOWN KILL DAC_OVERRIDE FOWNER SYS_PTRACE; do capabilities+=(--cap-add "$name"); done
# Writes a tree with what is hard to put back, then behaves like a gateway that is never ready.
stand_in=(-- sh -c 'test -e .openclaw/kept || { mkdir -p .openclaw/shut && echo kept >.openclaw/kept && chmod 0500 .openclaw/shut; }; exec sleep infinity')

passed=0
failed=0
# shellcheck disable=SC2329 # called by the trap
clean_up() {
    docker ps -aq --filter "name=$prefix" | xargs -r docker rm -fv >/dev/null
    docker volume ls -q --filter "name=$prefix" | xargs -r docker volume rm -f >/dev/null
}
trap clean_up EXIT

# check SENTENCE COMMAND...: one case, which passes when the command does.
check() {
    if "${@:2}"; then
        passed=$((passed + 1))
        echo "ok: $1"
    else
        failed=$((failed + 1))
        echo "FAILED: $1"
    fi
}

# start NAME [DOCKER ARGS...] IMAGE [ARGS...]: replaces a container of that name.
start() {
    docker rm -fv "$prefix-$1" >/dev/null 2>&1 || true
    docker run -d --name "$prefix-$1" --stop-timeout 60 -e "RUNTIME_SERVICE_TOKEN=$token" \
        -e RUNTIME_STORE=file:///store -e RUNTIME_STOP_GRACE=5s "${@:2}" >/dev/null
}

inside() { docker exec "$prefix-$1" "${@:2}"; }
as_gateway() { docker exec -u openclaw "$prefix-$1" "${@:2}"; }

# request NAME METHOD PATH: the body of the answer.
request() {
    # shellcheck disable=SC2016 # JavaScript's own
    docker exec -e "T=$token" "$prefix-$1" node -e '
        fetch("http://127.0.0.1:8080" + process.argv[2], {
            method: process.argv[1], headers: { authorization: `Bearer ${process.env.T}` },
        }).then(async (r) => console.log(await r.text()), (e) => { console.error(e.message); process.exit(1); })' "$2" "$3"
}
status_has() { request "$1" GET /v1/status 2>/dev/null | grep -q -- "$2"; }

# eventually SECONDS COMMAND...: tries until it works.
eventually() {
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        ((SECONDS < end)) || return 1
        sleep 0.3
    done
}
snapshot_is() { request "$1" POST /v1/backup | grep -q "\"consistency\":\"$2\""; }
kept() { inside "$1" test -e /data/.openclaw/kept; }
# All of the log is read: who stops at the first match makes docker fail with a broken pipe.
logged() { docker logs "$prefix-$1" 2>&1 | grep -- "$2" >/dev/null; }
exits_with() { [ "$(docker inspect -f '{{.State.ExitCode}}' "$prefix-$1")" = "$2" ]; }
refuses_without_token() {
    local code=0 text
    text=$(docker run --rm --name "$prefix-none" "$image" 2>&1) || code=$?
    [ "$code" = 64 ] && grep -q 'RUNTIME_SERVICE_TOKEN' <<<"$text"
}
# The whole tree belongs to the gateway's user, and its top to nobody else.
is_the_gateways() {
    [ "$(inside "$1" stat -c '%U %a' /data)" = 'openclaw 700' ] &&
        [ -z "$(inside "$1" find /data ! -user openclaw)" ] &&
        [ "$(inside "$1" stat -c %a /data/.openclaw/shut)" = 500 ]
}
has_no_settings_of_ours() {
    local pid environment
    pid=$(request "$1" GET /v1/status | grep -o '"pid":[0-9]*' | cut -d: -f2)
    # What `docker exec` starts has the container's own settings, so the gateway itself is asked about, by its own user.
    environment=$(as_gateway "$1" cat "/proc/$pid/environ" | tr '\0' '\n')
    grep -q '^HOME=/data$' <<<"$environment" && ! grep -q '^RUNTIME_' <<<"$environment"
}

check 'without a token it exits 64 and says so' refuses_without_token

for kind in overlay volume tmpfs; do
    docker volume rm -f "$prefix-data" >/dev/null 2>&1 || true
    place=()
    [ "$kind" != volume ] || place=(-v "$prefix-data:/data")
    [ "$kind" != tmpfs ] || place=(--tmpfs /data)
    run=(-v "$prefix-$kind:/store" "${place[@]}" "${capabilities[@]}" -e RUNTIME_GATEWAY_PREPARE=/bin/true "$image" "${stand_in[@]}")
    start "$kind" "${run[@]}"
    check "$kind: starts fresh on an empty store" eventually 20 kept "$kind"
    check "$kind: a snapshot is of one instant" snapshot_is "$kind" instant
    docker stop "$prefix-$kind" >/dev/null
    check "$kind: docker stop ends in exit 0" exits_with "$kind" 0
    check "$kind: with a final snapshot" logged "$kind" '"backed up"'
    docker rm -fv "$prefix-$kind" >/dev/null
    [ "$kind" != volume ] || docker volume rm "$prefix-data" >/dev/null
    # A stand-in that writes nothing: what is there then was restored.
    start "$kind" "${run[@]:0:${#run[@]}-${#stand_in[@]}}" -- sleep infinity
    check "$kind: a new container restores" eventually 20 status_has "$kind" '"status":"done"'
    check "$kind: the tree is back" kept "$kind"
    check "$kind: it is the gateway user's alone" is_the_gateways "$kind"
done

# The disk outlives the process. What was written since the snapshot must not be lost to the restore.
as_gateway overlay touch /data/.openclaw/since
docker kill -s KILL "$prefix-overlay" >/dev/null
docker start "$prefix-overlay" >/dev/null
check 'after SIGKILL: the tree on the disk is kept' eventually 20 status_has overlay '"status":"done"'
check 'after SIGKILL: also what no snapshot has' inside overlay test -e /data/.openclaw/since

read_only=(--read-only --tmpfs /tmp --tmpfs /data --tmpfs /var/lib/openclaw-runtime)
start offline "${read_only[@]}" "${capabilities[@]}" --network none -e RUNTIME_STORE=s3://bucket/prefix \
    -e RUNTIME_S3_ENDPOINT=https://store.invalid -e RUNTIME_S3_ACCESS_KEY_ID=a -e RUNTIME_S3_SECRET_ACCESS_KEY=b \
    -e RUNTIME_RESTORE_TIMEOUT=3s "$image" "${stand_in[@]}"
check 'store unreachable: the API answers, restoring' eventually 10 status_has offline '"status":"restoring"'
check 'store unreachable: with the error' eventually 20 status_has offline '"error":"[^"]'
docker stop "$prefix-offline" >/dev/null
check 'store unreachable: docker stop still ends in exit 0' exits_with offline 0

# What Docker gives by itself.
start plain -e RUNTIME_GATEWAY_PREPARE=/bin/true "$image" "${stand_in[@]}"
check 'without SYS_PTRACE: the gateway starts' eventually 20 kept plain
check 'without SYS_PTRACE: the log names it' logged plain 'root lacks capabilities.*SYS_PTRACE'
check 'without SYS_PTRACE: a snapshot is per-file' snapshot_is plain per-file
check 'without SYS_PTRACE: status says why' status_has plain '"consistencyReason":"[^"]*SYS_PTRACE'

start bare --cap-drop ALL "$image" "${stand_in[@]}"
check 'without capabilities: status names them' eventually 10 status_has bare 'capabilities.*SETUID'
start alone --cap-drop ALL --cap-add SETGID "$image" "${stand_in[@]}"
check 'without SETUID alone: the store is found empty' eventually 10 status_has alone '"status":"empty"'
refuses_as_root() { request alone POST /v1/backup | grep -q 'cannot do file work as user'; }
check 'without SETUID alone: no file work is done as root' refuses_as_root

# Somebody else as PID 1.
start init --init "${capabilities[@]}" -e RUNTIME_GATEWAY_PREPARE=/bin/true "$image" "${stand_in[@]}"
check 'behind docker run --init: the gateway starts' eventually 20 kept init
docker stop "$prefix-init" >/dev/null
check 'behind docker run --init: docker stop ends in exit 0' exits_with init 0

# A gateway that takes all memory there is.
start memory -m 128m --memory-swap 128m "${capabilities[@]}" -e RUNTIME_GATEWAY_PREPARE=/bin/true "$image" -- tail /dev/zero
check 'out of memory: status says so, and the supervisor lives' eventually 60 status_has memory '"reason":"oom"'
docker rm -fv "$prefix-memory" >/dev/null

# The real gateway, on a read-only root, with nothing but loopback.
start real "${read_only[@]}" "${capabilities[@]}" --network none -v "$prefix-real:/store" \
    --health-interval 2s --health-start-period 1s "$image"
check 'the gateway becomes ready, read-only and without network' eventually 180 status_has real '"status":"running"'
is_healthy() { [ "$(docker inspect -f '{{.State.Health.Status}}' "$prefix-real")" = healthy ]; }
check 'HEALTHCHECK turns healthy' eventually 20 is_healthy
has_devices() { request real GET /v1/devices | grep -q '"paired":\['; }
check 'devices are listed' has_devices
check "the gateway's user can run commands" as_gateway real head -c 1 /proc/1/status >/dev/null
request real POST /v1/backup >/dev/null
for path in /proc/1/environ /proc/1/mem /proc/1/maps; do
    cannot_read() { ! as_gateway real head -c 1 "$path" >/dev/null 2>&1; }
    check "the gateway's user cannot read $path" cannot_read
done
for path in /proc/1/fd /proc/1/cwd/ /var/lib/openclaw-runtime /store/local; do
    cannot_list() { ! as_gateway real ls "$path" >/dev/null 2>&1; }
    check "the gateway's user cannot list $path" cannot_list
done
check "no RUNTIME_* in the gateway's environment" has_no_settings_of_ours real
docker stop "$prefix-real" >/dev/null
check 'docker stop of the real gateway ends in exit 0' exits_with real 0

start real -v "$prefix-real:/store" "$image"
check 'the gateway starts from its restored state' eventually 180 status_has real '"gateway".*"status":"running"'
as_doctor() { docker exec -u openclaw -e HOME=/data "$prefix-real" openclaw doctor --non-interactive >/dev/null 2>&1; }
check 'openclaw doctor is content' as_doctor

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
