# The README's two commands and what they are made of. Each step is printed before it runs; what a step does is in the program it calls.
# Versions are in roles/kalium_versions, requirements/ and runtime/go.mod.

SITE ?= local
INVENTORY = inventory/$(SITE)

# The distribution's Python: what a fresh machine has.
PYTHON ?= /usr/bin/python3

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DEBIAN_FRONTEND := noninteractive
# Root runs the end-to-end tests: it must leave nothing in the checkout.
export PYTHONDONTWRITEBYTECODE := 1
export GOTOOLCHAIN := local

# How long each fuzz target runs, and each way of sending against a thread that changes descriptors.
FUZZ_TIME ?= 10m
RACE ?= 10s

CACHE := $(or $(KALIUM_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kalium)
REPORTS := $(CACHE)/reports
AS_ROOT = $(if $(filter 0,$(shell id -u)),,sudo --non-interactive env PATH="$(PATH)" PYTHONDONTWRITEBYTECODE=1 KALIUM_CACHE="$(CACHE)")
PYTEST = python -m pytest -p no:cacheprovider

GO = $(shell $(PYTHON) roles/kalium_toolchain/files/find_go.py $$(sed -n 's/^go //p' runtime/go.mod))
# The linters read what roles/kalium_runtime builds, so gVisor is compiled once for both.
AS_BUILT = CGO_ENABLED=0 GOFLAGS=-trimpath
STATICCHECK = $(shell sed -n '/^kalium_versions_staticcheck:/,/^$$/{s/^ *module: //p;s/^ *version: /@/p}' roles/kalium_versions/defaults/main.yml | tr -d '\n')

.PHONY: help reproduce test setup site reset check format check-python check-go check-ansible control integration site-tests developer lock clean
.PHONY: test-guard bench-guard bench-controller soak cluster-test fuzz reproduce-steps control-steps test-steps site-steps reset-steps check-steps
.PHONY: test-guard-steps bench-guard-steps bench-controller-steps soak-steps cluster-test-steps

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done
	@echo "  SITE=local names the folder under inventory/ ($$(ls -d inventory/*/ | xargs -n1 basename | tr '\n' ' '))"

reproduce: ## set this machine up, run the experiments and the attacks, draw the figures
	@.ci/privileged "make reproduce" $(MAKE) reproduce-steps

test: ## linters, types and unit tests of both languages, then the site and the end-to-end tests
	@.ci/privileged "make test" $(MAKE) test-steps

setup: ## make .venv from the locked requirements
	.ci/setup $(PYTHON) operator

site: ## set the site up (ansible-playbook site.yml)
	@.ci/privileged "make site" $(MAKE) site-steps

reset: ## remove exactly what was installed
	@.ci/privileged "make reset" $(MAKE) reset-steps

check: ## format, lint, types and unit tests of both languages
	@.ci/privileged "make check" $(MAKE) check-steps

format: developer ## bring Python and Go into their format
	ruff format .
	ruff check --fix .
	$(dir $(GO))gofmt -w runtime

control: ## controllers, agents and a Redis as real processes that are killed and cut off, and the attacks on them
	@.ci/privileged "make control" $(MAKE) control-steps

test-guard: ## the guard in real sandboxes: every way out, unmodified clients; the table goes to results/bypass
	@.ci/privileged "make test-guard" $(MAKE) test-guard-steps

cluster-test: ## a whole site on three hosts of its own, from bare to bare: STEPS="--keep -k 'not e1'" are options of pytest
	@.ci/privileged "make cluster-test" $(MAKE) cluster-test-steps

fuzz: developer ## every fuzz target of runtime/ for FUZZ_TIME (default 10m)
	.ci/fuzz $(GO) $(FUZZ_TIME)

bench-guard: ## what judging adds, side by side with mode off; figures go to results/bench/guard
	@.ci/privileged "make bench-guard" $(MAKE) bench-guard-steps

bench-controller: ## what a step and an app edge cost, side by side with echo servers; figures go to results/bench/controller
	@.ci/privileged "make bench-controller" $(MAKE) bench-controller-steps

soak: ## two controllers, two agents and Redis under faults: SOAK="--minutes 10 --seed 1 --calls 10000"; the table goes to results/soak
	@.ci/privileged "make soak" $(MAKE) soak-steps

lock: ## resolve requirements/*.in into locked *.txt anew
	.ci/setup $(PYTHON) dev
	.ci/lock

clean: ## remove .venv and this project's caches; what is installed stays (make reset)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis $(CACHE)

# What the targets above do once the question about root is settled.

reproduce-steps: setup
	ansible-playbook site.yml -i $(INVENTORY)
	fab check
	fab run-e1
	fab run-e2
	fab run-attacks
	fab plot
	@.ci/activation

site-steps: setup
	ansible-playbook site.yml -i $(INVENTORY)
	@.ci/activation

reset-steps: setup
	ansible-playbook reset.yml -i $(INVENTORY)

check-steps: check-python check-ansible check-go

test-steps:
	rm -rf $(REPORTS)
	$(MAKE) check-steps
	$(MAKE) control-steps
	ansible-playbook site.yml -i $(INVENTORY)
	$(MAKE) site-tests
	$(MAKE) test-guard-steps RACE=1s
	$(MAKE) integration

developer:
	.ci/setup $(PYTHON) dev
	@if ! $(PYTHON) roles/kalium_toolchain/files/find_go.py "$$(sed -n 's/^go //p' runtime/go.mod)" >/dev/null || ! PATH="$$PATH:/usr/sbin" type -P gcc redis-server sshd systemd-nspawn mmdebstrap slirp4netns nft >/dev/null; then \
		echo "ansible-playbook playbooks/developer.yml -i $(INVENTORY)"; \
		ansible-playbook playbooks/developer.yml -i $(INVENTORY); fi

check-python: developer
	ruff format --check --output-format concise .
	ruff check .
	mypy
	$(PYTEST) --quiet --junitxml=$(REPORTS)/python.xml tests/unit tests/protocol

check-ansible: developer
	yamllint --strict .
	ansible-lint

check-go: developer
	@test -z "$$($(dir $(GO))gofmt -l runtime)" || { echo "not formatted:"; $(dir $(GO))gofmt -l runtime; exit 1; }
	cd runtime && $(AS_BUILT) $(GO) vet ./...
	cd runtime && $(AS_BUILT) $(GO) run $(STATICCHECK) ./...
	cd runtime && $(GO) test -race -json ./... | $(PYTHON) ../.ci/report.py go $(REPORTS)/go.json
	.ci/fuzz $(GO) 3000x

site-tests: developer
	@mkdir -p $(REPORTS)
	$(PYTEST) --quiet --junitxml=$(REPORTS)/site.xml tests/site

control-steps: developer
	@mkdir -p $(REPORTS)
	$(AS_ROOT) $(PYTEST) --quiet --junitxml=$(REPORTS)/control.xml tests/control

integration: developer
	@mkdir -p $(REPORTS)
	$(AS_ROOT) $(PYTEST) --quiet --junitxml=$(REPORTS)/integration.xml tests/integration

test-guard-steps: developer
	@mkdir -p $(REPORTS)
	cd runtime && $(AS_ROOT) env KALIUM_RACE=$(RACE) $(AS_BUILT) $(GO) test -tags sandbox -json ./internal/sentry | $(PYTHON) ../.ci/report.py go $(REPORTS)/sandbox.json
	$(AS_ROOT) $(PYTEST) --quiet --junitxml=$(REPORTS)/guard.xml tests/guard

cluster-test-steps: developer
	$(PYTEST) -v -x -rP tests/cluster $(STEPS)

bench-controller-steps: developer
	$(AS_ROOT) env PYTHONPATH=tests:. python -m control.bench

soak-steps: developer
	$(AS_ROOT) env PYTHONPATH=tests:. python -m control.soak $(SOAK)

bench-guard-steps: developer
	$(AS_ROOT) env PYTHONPATH=tests:. python -m guard.bench
