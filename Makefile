# Everything below works from a fresh clone; "make help" lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CONTAINERD_VERSION := 2.4.2
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 60s
ROUNDS   ?= 200
PACKAGES ?= ./...

# What has tests in a guest: those that call guest.New.
VM_PACKAGES ?= $(shell grep -rl --include='*_test.go' 'e2e/guest"' . | xargs -r -n1 dirname | sort -u)

# go-ceph wants to be told of a librbd older than 18, as Debian 12's.
CEPH_TAGS = ceph$(shell grep -qs rbd_encryption_load2 /usr/include/rbd/librbd.h || echo ,pacific)
CEPH_PACKAGES ?= ./attacher/backend/rbd ./e2e/ceph

# The tools are built when their versions change, which tools/go.mod and go.sum name.
TOOLS_STAMP := bin/.tools-$(shell cat tools/go.mod tools/go.sum | sha256sum | cut -c1-16)

export CGO_ENABLED = 0

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo IMAGE=ref      another image instead of the one built from Debian"
	@echo "  make demo ALL=1          all four combinations of mode and file system"
	@echo "  make fuzz FUZZTIME=60s   how long each fuzz target runs"
	@echo "  make bench BENCH=io      only rows whose name begins so: io, convert, lvol, erofs, ext4, warm, cold, control"
	@echo "  make crash ROUNDS=200    how many rounds, SEED=n to repeat a run"

.PHONY: build
build: ## build bin/thaw, a static binary
	@mkdir -p bin
	go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/thaw ./cmd/thaw

.PHONY: build-failpoint
build-failpoint: ## build bin/thaw-failpoint, which can be told to die at named steps (package failpoint)
	@mkdir -p bin
	go build -trimpath -tags failpoint -ldflags '-s -w -X main.version=$(VERSION)' -o bin/thaw-failpoint ./cmd/thaw

.PHONY: ceph
ceph: ## build bin/thaw-ceph, which keeps lvols in Ceph too (cgo, librbd-dev)
	@mkdir -p bin
	CGO_ENABLED=1 go build -trimpath -tags $(CEPH_TAGS) -ldflags '-s -w -X main.version=$(VERSION)' -o bin/thaw-ceph ./cmd/thaw

.PHONY: tools
tools: $(TOOLS_STAMP) ## build containerd, its shim, ctr and staticcheck into bin/

$(TOOLS_STAMP):
	@mkdir -p bin
	@rm -f bin/.tools-*
	@echo "building containerd $(CONTAINERD_VERSION) and the other tools; minutes when nothing is cached"
	cd tools && go build -trimpath -ldflags '-s -w -X github.com/containerd/containerd/v2/version.Version=$(CONTAINERD_VERSION)' -o ../bin/ tool
	@touch $@

.PHONY: deps
deps: ## install the Debian packages that tests, demo and benchmarks run (root)
	@tools/install-deps

.PHONY: lint
lint: tools ## gofmt, go vet, staticcheck, import rules
	@unformatted=$$(git ls-files '*.go' | xargs gofmt -l); \
	  if [ -n "$$unformatted" ]; then echo "not formatted, run gofmt -w on:"; echo "$$unformatted"; exit 1; fi
	go vet $(PACKAGES)
	bin/staticcheck $(PACKAGES)
	go test ./e2e/archtest

.PHONY: unit
unit: ## the tests that need no containerd
	@go test -json -timeout 12m $$(go list $(PACKAGES) | grep -v '/thaw/e2e$$') | go run ./e2e/report

.PHONY: e2e
e2e: deps tools build ## the end-to-end tests
	@THAW_E2E=1 go test -json -count=1 -timeout 40m ./e2e ./e2e/kill | go run ./e2e/report -live /e2e

.PHONY: test-spdk
test-spdk: ## what SPDK's methods answer, asked of a running one: make test-spdk SPDK_SOCK=/var/tmp/spdk.sock
	@test -n "$(SPDK_SOCK)" || { echo "make test-spdk: give the socket of an SPDK or thaw target: SPDK_SOCK=/var/tmp/spdk.sock" >&2; exit 2; }
	SPDK_SOCK=$(SPDK_SOCK) SPDK_USED=$(SPDK_USED) go test -count=1 -v -run '^TestSPDK$$' ./target

.PHONY: test-vm
test-vm: deps tools build ## the tests that need another kernel, in a virtual machine without KVM (root)
	@tools/install-deps guest
	@go run ./e2e/guest/try
	@THAW_VM=1 go test -json -count=1 -p 1 -timeout 30m $(VM_PACKAGES) | go run ./e2e/report -live /e2e/guest

.PHONY: test-ceph
test-ceph: deps tools ## a Ceph cluster of one machine: conformance, conversion, start, figures (root)
	@tools/install-deps ceph
	@$(MAKE) --no-print-directory ceph
	@CGO_ENABLED=1 go vet -tags $(CEPH_TAGS),failpoint $(CEPH_PACKAGES)
	@THAW_CEPH=1 CGO_ENABLED=1 go test -tags $(CEPH_TAGS),failpoint -json -count=1 -p 1 -timeout 30m $(CEPH_PACKAGES) | go run ./e2e/report -live /e2e/ceph

.PHONY: test
test: ## everything CI runs: lint, all tests, end-to-end tests; installs what it needs
	@tools/run-stages deps tools build lint unit e2e

.PHONY: race
race: ## the tests that need no containerd, under the race detector (slow; needs gcc)
	@CGO_ENABLED=1 go test -race -json -timeout 40m $$(go list $(PACKAGES) | grep -v '/thaw/e2e$$') | go run ./e2e/report

.PHONY: demo
demo: deps tools build ## start a real image cold with containerd's overlayfs and with Thaw
	@go run ./e2e/demo $(if $(ALL),-all)

.PHONY: bench
bench: deps tools build ## measure conversion, I/O and starts; table and out/bench.json
	@go run ./bench $(if $(BENCH),-run '^$(BENCH)[-/]')

.PHONY: crash
crash: deps tools build ## kill processes at random moments, ROUNDS times
	@THAW_E2E=1 THAW_CRASH_ROUNDS=$(ROUNDS) THAW_SEED=$(SEED) go test -json -count=1 -timeout 6h -run '^TestCrash' ./e2e | go run ./e2e/report -live /e2e

.PHONY: test-kill
test-kill: deps tools build ## kill -9 of every process of the control chain at every step, and at all pairs of steps
	@tools/install-deps guest
	@THAW_E2E=1 THAW_KILL=all THAW_SEED=$(SEED) go test -json -count=1 -timeout 3h ./e2e/kill | go run ./e2e/report -live /e2e/kill

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME
	@tools/run-fuzz $(FUZZTIME)

.PHONY: sweep
sweep: ## remove what killed test, demo and benchmark runs left behind (root)
	@go run ./e2e/lab/sweep

.PHONY: clean
clean: ## remove bin/ and out/, with built tools and cached images
	rm -rf bin out
