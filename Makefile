# Two commands do everything on a fresh Debian 12 machine with root: `make run` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := .cache/build-venv

# libbpf1: the eBPF source works without it being there, but then the next source takes over.
RUN_PACKAGES := python3-venv libbpf1
TEST_PACKAGES := $(RUN_PACKAGES) gcc libc6-dev linux-libc-dev qemu-system-x86 \
	prometheus prometheus-alertmanager chromium curl openssl \
	libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients \
	clang-14 llvm-14 libbpf-dev patch perl lz4 \
	systemd debootstrap rpm man-db lintian tmux

.PHONY: run demo test unit lab bench hostile fuzz bpf kernel dist packages deploy-test display-test pictures scale clean test-packages run-packages

run: $(VENV)/.installed
	$(BIN)/kvm-notify-exporter serve

demo: $(VENV)/.installed
	exec env KVM_NOTIFY_EXPORTER=$(BIN)/kvm-notify-exporter grafana/demo 127.0.0.1:9750 127.0.0.1:9751

# Where guests run, and in the lab, tests have the machine to themselves; the others share it.
test: $(VENV)/.installed-dev test-packages
	@status=0; \
	$(BIN)/python -m pytest -n logical --dist loadfile -m "not live and not lab" || status=$$?; \
	$(BIN)/python -m pytest -m "live or lab" || status=$$?; \
	exit $$status

# Everything that needs neither root nor /dev/kvm, nor a package that is not there: for while you write.
unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m "not live and not lab and not slow"

bench: $(VENV)/.installed-dev test-packages
	@.ci/install-packages prometheus-node-exporter
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.bench_alternatives
	$(BIN)/python -m tests.bench.bench_stats
	$(BIN)/python -m tests.bench.bench_flood

# Attacks of every kind at once, for an hour (MINUTES=3: for three), and a table of what came of it.
hostile: $(VENV)/.installed-dev test-packages
	$(BIN)/python -m tests.hostile $(if $(MINUTES),--minutes=$(MINUTES))

# Coverage-guided fuzzing of every decoder and parser, so many seconds each.
fuzz: SECONDS ?= 60
fuzz: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds=$(SECONDS)

lab: $(VENV)/.installed-dev test-packages
	$(BIN)/python -m tests.lab $(if $(KERNEL),--kernel $(KERNEL)) $(if $(PATCHED),--patched)

# KVM's modules with kvm/patches, for Debian's kernel of a series (6.1, 6.12 or 7); prints where they are.
kernel: SERIES ?= 6.12
kernel: $(VENV)/.installed-dev test-packages
	$(BIN)/python -m tests.lab.patched --series $(SERIES)

bpf: $(VENV)/.installed-dev test-packages
	$(BIN)/python -m tests.build_bpf

# The packages on Debian 12 and 13, in containers and as a machine; the image; the manifests as kubectl renders them.
deploy-test: $(VENV)/.installed-dev test-packages
	@.ci/install-packages podman buildah crun uidmap e2fsprogs iproute2
	DEPLOY_TESTS=1 $(BIN)/python -m pytest -m deploy tests/deploy

# What a person reads on the dashboards, by Grafana's own library.
GRAFANA_NPM := .cache/grafana-npm
display-test: $(VENV)/.installed-dev test-packages $(GRAFANA_NPM)/.installed
	DISPLAY_TESTS=1 $(BIN)/python -m pytest -m display tests/grafana tests/pictures

$(GRAFANA_NPM)/.installed: tests/grafana/npm/package.json tests/grafana/npm/package-lock.json tests/grafana/npm/.npmrc
	@command -v npm >/dev/null || .ci/install-packages nodejs npm
	rm -rf $(GRAFANA_NPM)
	mkdir -p $(GRAFANA_NPM)
	cp $^ $(GRAFANA_NPM)
	cd $(GRAFANA_NPM) && npm ci
	touch $@

# docs/pictures: the dashboards on a simulated day, the status page, a terminal; six minutes.
PICTURES_NPM := .cache/pictures-npm
pictures: $(VENV)/.installed-dev test-packages $(PICTURES_NPM)/.installed
	@.ci/install-packages pngquant optipng fonts-dejavu-core
	$(BIN)/python -m tests.pictures $(PICTURES)

$(PICTURES_NPM)/.installed: $(addprefix tests/pictures/npm/,package.json package-lock.json .npmrc build.mjs)
	@command -v npm >/dev/null || .ci/install-packages nodejs npm
	rm -rf $(PICTURES_NPM)
	mkdir -p $(PICTURES_NPM)
	cp $^ $(PICTURES_NPM)
	cd $(PICTURES_NPM) && npm ci
	touch $@

# Rules and dashboards on a Prometheus with 300 hosts and 50,000 VMs; 20 minutes and 8 GiB of memory.
scale: $(VENV)/.installed-dev test-packages
	$(BIN)/python -m tests.bench.scale

# Wheel and sdist, in dist/.
dist: $(BUILD)/.installed
	$(BUILD)/bin/python -m build --no-isolation --outdir dist

# A .deb, an .rpm and their bill of materials (CycloneDX), in dist/.
packages: $(BUILD)/.installed
	$(BUILD)/bin/python -m deploy --outdir=dist

# What releases are built with: these files and no others, by their hashes. `python -m deploy.locks` renews the list.
$(BUILD)/.installed: deploy/locks/build.txt | run-packages
	rm -rf $(BUILD)
	$(PYTHON) -m venv $(BUILD)
	$(BUILD)/bin/pip install --quiet --require-hashes --requirement deploy/locks/build.txt
	touch $@

run-packages:
	@.ci/install-packages $(RUN_PACKAGES)

test-packages:
	@.ci/install-packages $(TEST_PACKAGES)

$(VENV)/.installed: pyproject.toml | run-packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
