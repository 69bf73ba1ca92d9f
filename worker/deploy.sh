#!/bin/sh
# Deploys one instance: `make deploy INSTANCE=<id> SECRETS=<file> [STORE=s3://bucket/prefix]`. See docs/deploy.md.
# Looks first for everything that is missing and says all of it at once; nothing has happened yet then.
set -eu
cd "$(dirname "$0")/.."
PATH="$(gateway/install.sh)/bin:$PWD/worker/node_modules/.bin:$PATH"
export PATH WRANGLER_SEND_METRICS=false

missing=0
miss() {
    echo "deploy: $1" >&2
    missing=1
}

instance=${INSTANCE:-}
# The Worker's name is part of a host name, which has room for 63 characters.
printf '%s\n' "$instance" | grep -Eqx '[a-z0-9]([a-z0-9-]{0,44}[a-z0-9])?' ||
    miss "INSTANCE must be 1 to 46 lower-case letters, digits and dashes, with no dash at its ends; it is '$instance'."

if [ -n "${STORE:-}" ]; then
    printf '%s\n' "$STORE" | grep -Eqx 's3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._/-]+)?' ||
        miss "STORE must look like s3://bucket/prefix; it is '$STORE'."
fi

secrets=${SECRETS:-}
if [ -z "$secrets" ]; then
    miss "SECRETS must name a file of secrets, as NAME=value lines or as JSON."
elif [ ! -r "$secrets" ]; then
    miss "The secrets file $secrets cannot be read."
else
    # Names only: no value is ever printed.
    # shellcheck disable=SC2016 # the script is JavaScript
    node -e '
        const text = require("fs").readFileSync(process.argv[1], "utf8");
        let secrets;
        try { secrets = text.trimStart().startsWith("{") ? JSON.parse(text) : require("util").parseEnv(text); }
        catch { console.error("deploy: The secrets file is not valid JSON."); process.exit(1); }
        const wrong = [];
        if (!/^[!-~]{32,512}$/.test(secrets.RUNTIME_SERVICE_TOKEN ?? ""))
            wrong.push("needs a RUNTIME_SERVICE_TOKEN of 32 to 512 printable characters without spaces");
        for (const name of ["RUNTIME_S3_ENDPOINT", "RUNTIME_S3_ACCESS_KEY_ID", "RUNTIME_S3_SECRET_ACCESS_KEY"])
            if (!secrets[name]) wrong.push(`needs ${name}`);
        for (const name of ["RUNTIME_INSTANCE_ID", "RUNTIME_INSTANCE_TYPE", "RUNTIME_STORE", "RUNTIME_LIFECYCLE"])
            if (name in secrets) wrong.push(`must not have ${name}, which is a plain variable`);
        for (const what of wrong) console.error(`deploy: The secrets file ${what}.`);
        process.exit(wrong.length ? 1 : 0);
    ' "$secrets" || missing=1
fi

for binary in supervisor backup-agent; do
    if [ ! -x "dist/$binary" ]; then
        miss "dist/$binary is missing: run make release."
    elif [ "$(od -An -tx1 -j18 -N1 "dist/$binary" | tr -d ' ')" != 3e ]; then
        miss "dist/$binary is not for x86-64, which the platform's containers are."
    fi
done
docker info >/dev/null 2>&1 || miss "No Docker engine answers; it builds the image."
wrangler whoami --json >/dev/null 2>&1 ||
    miss "wrangler is not logged in: run worker/node_modules/.bin/wrangler login, or set CLOUDFLARE_API_TOKEN."
[ "$missing" = 0 ] || exit 64

name="openclaw-runtime-$instance"
# The container application is named after the configuration's name, whatever --name says, and each instance needs its
# own. Beside the original, because paths in it are relative.
config=$(mktemp -p . wrangler.XXXXXX.jsonc)
trap 'rm -f "$config"' EXIT
sed "s/^  \"name\": \"openclaw-runtime\",/  \"name\": \"$name\",/" wrangler.jsonc >"$config"
grep -q "\"name\": \"$name\"" "$config" || { miss 'wrangler.jsonc has no line "name": "openclaw-runtime".'; exit 64; }
set -- --config "$config" --name "$name" --var "RUNTIME_INSTANCE_ID:$instance"
[ -z "${STORE:-}" ] || set -- "$@" --var "RUNTIME_STORE:$STORE"
# Code first: until it has its token a new Worker serves nothing and starts nothing.
wrangler deploy "$@"
wrangler secret bulk "$secrets" --config "$config" --name "$name"
