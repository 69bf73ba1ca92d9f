# The commands that people and CI share. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test fuzz lint advisories release bench bench-backup bench-edge image e2e worker deploy clean

# Static binaries: they run in any image. On another machine's architecture this needs a cross compiler for C.
TARGET ?= $(patsubst arm64,aarch64,$(shell uname -m))-unknown-linux-musl
IMAGE ?= openclaw-runtime
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/openclaw-runtime

# Newer versions may judge differently: the verdict on a commit must not depend on the day.
DENY_VERSION := 0.20.2
DENY := $(CACHE)/cargo-deny-$(DENY_VERSION)/bin/cargo-deny

# Another version may take other flags from a stable compiler.
FUZZ_VERSION := 0.13.1
FUZZ := $(CACHE)/cargo-fuzz-$(FUZZ_VERSION)/bin/cargo-fuzz

# npm's own record of what it installed; older than the lock means install again.
WORKER := worker/node_modules/.package-lock.json
# Its tools need a newer Node.js than systems bring: the gateway's. None of them may ask, report or look for updates.
WORKER_ENV = PATH="$$(gateway/install.sh)/bin:$$PWD/worker/node_modules/.bin:$$PATH" CI=1 WRANGLER_SEND_METRICS=false

# $(call need,TEST,PACKAGE): where TEST fails, installs the Debian package as root, else says what is missing.
define need
	@$(1) >/dev/null 2>&1 || { \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "installing $(2)" >&2; \
	        { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $(2); } >&2; \
	    else \
	        echo "missing: the Debian package(s) $(2), or the equal on this system; install it and run make again" >&2; exit 1; \
	    fi; }
endef

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: release ## Build, then run the runtime with a real OpenClaw gateway on this machine (state in .runtime/)
	@exec gateway/run.sh

test: $(WORKER) ## Run all tests: the real binaries, the real gateway, a real S3 server
	$(call need,python3 -c 'import ensurepip',python3-venv)
	$(call need,command -v zstd,zstd)
	$(call need,command -v cc,build-essential)
	$(call need,command -v debugfs && command -v mkfs.ext4,e2fsprogs)
	$(call need,command -v strace && command -v zsh && command -v dash && command -v busybox && command -v tmux,strace zsh dash busybox tmux)
	$(call need,command -v script && command -v setpriv && command -v unshare,bsdutils util-linux)
	$(call need,test -x /usr/bin/python3,python3-minimal)
	@exec tests/run.sh

fuzz: $(FUZZ) ## Run each fuzz target for FUZZ_SECONDS (60), all at once, on readers of what others may have written
	@PATH="$(dir $(FUZZ)):$$PATH" exec tests/fuzz/run.sh

lint: $(DENY) $(WORKER) ## Check format, clippy, types, shell scripts, and dependencies (bans, licences, sources)
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	@# `--all-targets` leaves out what a plain `cargo test` does not run.
	cargo clippy --locked -p e2e --test edge -- -D warnings
	$(call need,command -v shellcheck,shellcheck)
	shellcheck gateway/*.sh tests/*.sh tests/fuzz/*.sh worker/*.sh .ci/run
	@export $(WORKER_ENV); set -x; tsc --noEmit -p worker
	@export $(WORKER_ENV); set -x; prettier --config worker/.prettierrc.json --check wrangler.jsonc worker/src worker/test 'worker/*.ts'
	gateway/check-node.sh
	$(DENY) --locked check bans licenses sources

advisories: $(DENY) ## Check dependencies against the RustSec advisories (fetches that database from GitHub)
	$(DENY) --locked check advisories

release: ## Build both static binaries into dist/ and print their sizes: at most 1.5 MiB for the supervisor, 4 for the agent
	$(call need,command -v musl-gcc,musl-tools)
	@rustup target list --installed | grep -qx $(TARGET) || rustup target add $(TARGET)
	@mkdir -p dist
	@# One at a time: built together, each would get the features that only the other's dependencies want.
	@for pair in supervisor:release backup-agent:agent; do \
	    binary=$${pair%:*} profile=$${pair#*:}; \
	    cargo build --locked --profile $$profile --target $(TARGET) -p $$binary; \
	    install "$${CARGO_TARGET_DIR:-target}/$(TARGET)/$$profile/$$binary" dist/; \
	done
	@stat -c '%s %n' dist/supervisor dist/backup-agent | awk '{ \
	    printf "%-18s %8d bytes  %.2f MiB\n", $$2, $$1, $$1 / 1048576; if ($$1 > ($$2 ~ /supervisor/ ? 1572864 : 4194304)) status = 1 } \
	    END { exit status }'

bench: release ## Measure the released binaries with a real gateway; prints a table
	@E2E_BIN_DIR="$$PWD/dist" cargo bench --locked -p e2e --bench runtime

bench-supervisor: release ## Measure the supervisor beside its peers; writes docs/benchmarks/supervisor.md; needs root
	$(call need,command -v s6-svscan,s6)
	$(call need,python3 -c 'import ensurepip',python3-venv)
	@cargo build --locked --release --target $(TARGET) -p supervisor --example hello
	@cargo build --locked --release --target $(TARGET) -p e2e --bin fake-gateway
	@export PATH="$$(tests/install-supervisors.sh):$$PATH" E2E_BIN_DIR="$$PWD/dist"; \
	    built=$$(realpath "$${CARGO_TARGET_DIR:-target}/$(TARGET)/release"); \
	    E2E_HELLO="$$built/examples/hello" E2E_STATIC_GATEWAY="$$built/fake-gateway" \
	    cargo bench --locked -p e2e --bench supervisor

bench-backup: release ## Measure backup and restore beside the peers in PATH; writes docs/benchmarks/backup.md
	@E2E_BIN_DIR="$$PWD/dist" cargo bench --locked -p e2e --bench backup

bench-edge: image worker ## Measure the edge with a container of the image; prints a table; needs a Docker engine
	$(call need,python3 -c 'import ensurepip',python3-venv)
	@E2E_MOTO_SERVER=$$(tests/install-s3.sh) E2E_IMAGE=$(IMAGE) cargo bench --locked -p e2e --bench edge

image: release ## Build the container image from dist/ and gateway/ [BASE=node:26-bookworm-slim@sha256:...]
	docker build $(if $(BASE),--build-arg BASE=$(BASE)) -t $(IMAGE) .

e2e: image worker ## Test the image, and the whole way from the Worker through it to a store; needs a Docker engine
	$(call need,python3 -c 'import ensurepip',python3-venv)
	@exec tests/e2e.sh $(IMAGE)

worker: $(WORKER) ## Bundle the Worker into dist/worker/ and print its size, which must be under 3 KiB
	@export $(WORKER_ENV); wrangler deploy --dry-run --containers-rollout=none --outdir dist/worker >/dev/null
	@stat -c '%s %n' dist/worker/index.js | awk '{ printf "%-18s %8d bytes  %.2f KiB\n", $$2, $$1, $$1 / 1024; exit $$1 >= 3072 }'

deploy: $(WORKER) ## Deploy one instance to Cloudflare: INSTANCE=<id> SECRETS=<file> [STORE=s3://bucket/prefix]
	@INSTANCE='$(INSTANCE)' SECRETS='$(SECRETS)' STORE='$(STORE)' exec worker/deploy.sh

clean: ## Remove build results; keeps .runtime/ (your state) and the caches
	cargo clean
	rm -rf dist worker/node_modules

$(WORKER): worker/package.json worker/package-lock.json
	@cd worker && PATH="$$(../gateway/install.sh)/bin:$$PATH" npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

$(DENY):
	cargo install cargo-deny --version $(DENY_VERSION) --locked --debug --root $(dir $(@D))

$(FUZZ):
	cargo install cargo-fuzz --version $(FUZZ_VERSION) --locked --debug --root $(dir $(@D))
