# The front door: `make demo` and `make test` on a fresh machine, nothing before them. What is prepared, and where it goes,
# is told in tools/prepare; a second run finds everything in place and says nothing.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
TESTFLAGS ?=
LONG ?=
PARALLEL ?= 2

.PHONY: help setup venv tools base tailnet demo test lint bench lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## everything that the other targets need: packages, .venv, tofu and provider, the lab's base image
	@tools/prepare all

venv: ## only .venv
	@tools/prepare venv

tools: ## only OpenTofu and the hcloud provider
	@tools/prepare tofu

base: venv ## only the lab's base image
	@tools/prepare base

tailnet: ## headscale and tailscaled for the lab, whose tailnet is a stand-in without them (six minutes the first time)
	@tools/prepare tailnet

demo: setup ## the whole workflow on the lab: declared fleet to verified, locked-down host, with no cloud account
	@$(PY) -m clawdlets_ops.lab.demo

test: setup lint ## lint, then every tier of tests that this machine can run, PARALLEL=2 files at a time; LONG=1 adds the longest stories, TESTFLAGS goes to pytest
	@tools/prepare tailnet || echo 'tailnet: not built; the tests that need it are skipped and the lab has its stand-in'
	@LONG=$(LONG) $(PY) -m pytest -n $(PARALLEL) --dist loadfile $(TESTFLAGS)

lint: venv ## ruff (rules and format) and mypy --strict
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy --no-error-summary

bench: setup ## every benchmarks/*.py
	@shopt -s nullglob; found=(benchmarks/*.py); \
	if [ $${#found[@]} -eq 0 ]; then echo 'there is no benchmark yet'; fi; \
	for file in "$${found[@]}"; do echo "$$file"; $(PY) "$$file"; done

lock: ## writes requirements/*.txt anew from requirements/*.in; UPGRADE=1 takes the newest versions
	@tools/prepare lock

clean: ## removes .venv, .cache and the caches of tools; never .clawdlets, which holds keys and state
	@tools/prepare clean
