# Two commands for a fresh machine with Go and a C compiler: make demo, make test.
# Everything else (Ollama servers, small models, Python and Node clients) is built or installed
# once, into $OLLAMA_CACHEPROXY_CACHE, or else into ollama-cacheproxy in the user's cache folder.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null)

STATICCHECK      := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOCYCLO          := github.com/fzipp/gocyclo/cmd/gocyclo@v0.6.0
DOCKERFILE_UTILS := dockerfile-utils@0.16.3
GORELEASER       := github.com/goreleaser/goreleaser/v2@v2.15.1
# These run go test, and print each package or each test when it ends.
GOTESTSUM        := $(GO) run gotest.tools/gotestsum@v1.13.0 --hide-summary skipped
TEST_PACKAGES    := $(GOTESTSUM) --format pkgname -- -race -count=1 -timeout 30m
TEST_EACH        := $(GOTESTSUM) --format testname -- -race -count=1 -timeout 55m

# Minimizing new inputs has a limit, since it could otherwise take the whole minute.
FUZZ             := $(GO) test -run '^$$' -fuzztime 60s -fuzzminimizetime 20x -fuzz

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: build
build: ## build bin/ollama-cacheproxy
	$(GO) build -trimpath -ldflags '-s -w -X main.versionText=$(VERSION) -X main.commitText=$(COMMIT)' -o bin/ollama-cacheproxy ./cmd/ollama-cacheproxy

# Goreleaser reports no commit if the repository has no origin.
.PHONY: release-snapshot
release-snapshot: export GIT_CONFIG_COUNT = 1
release-snapshot: export GIT_CONFIG_KEY_0 = remote.origin.url
release-snapshot: export GIT_CONFIG_VALUE_0 = https://github.com/ollama-cacheproxy/ollama-cacheproxy.git
release-snapshot: ## all files of a release, in dist: archives, packages, checksums, bills of materials
	$(GO) run $(GORELEASER) release --snapshot --clean

.PHONY: demo
demo: ## real Ollama, a small model, a Python client: with and without the proxy
	$(GO) run ./integration/cmd/demo

.PHONY: test
test: servers check-deploy ## all tests, on real Ollama servers and with real clients too
	@echo "the packages' own tests (5 to 12 min on 2 cores) …"
	$(TEST_PACKAGES) $$($(GO) list ./... | grep -v /integration)
	@echo "the tests on real Ollama servers (25 to 40 min on 2 cores) …"
	$(TEST_EACH) -p 1 ./integration/...

# The tests that may depend on the engine's build, on an engine built from its source rather than
# the prebuilt one.
.PHONY: test-engine-source
test-engine-source: export OLLAMA_CACHEPROXY_ENGINE = source
test-engine-source: export OLLAMA_ERAS = b c
test-engine-source: servers ## the tests of the engine, on llama-server built from its source (10 min more, once)
	$(TEST_EACH) ./integration/realollama
	$(TEST_EACH) -run '^(TestSimulated|TestTruth|TestPrefix)$$' ./integration

.PHONY: servers
servers: ## find or build the Ollama servers and models that the tests use
	$(GO) run ./integration/cmd/realollama ensure --models

.PHONY: lint
lint: ## gofmt, vet, staticcheck, no complex functions; the Dockerfile (needs npx)
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "not gofmt'ed: $$unformatted"; exit 1; fi
	$(GO) vet ./...
	GOOS=darwin $(GO) vet ./...
	GOOS=windows $(GO) vet ./...
	$(GO) mod tidy -diff
	$(GO) run $(STATICCHECK) ./...
	$(GO) run $(GOCYCLO) -over 15 -ignore '_test\.go$$' .
	npx --yes $(DOCKERFILE_UTILS) lint Dockerfile

.PHONY: check-deploy
check-deploy: ## the Helm chart and the manifests, without a cluster (a minute at first: it compiles Helm)
	cd deploy/check && $(GO) mod tidy -diff && $(GO) vet ./... && $(GO) test -count=1 ./...

.PHONY: manifests
manifests: ## write deploy/kubernetes from the Helm chart
	cd deploy/check && $(GO) test -count=1 -run '^TestManifests$$' . -update

.PHONY: bench
bench: ## what the proxy costs: tables of requests per second, latencies and allocations
	$(GO) test -run '^$$' -bench . ./jsonscan ./prefix ./contextstore ./savings ./schedule ./proxy
	$(GO) run ./bench/overhead

.PHONY: bench-lanes
bench-lanes: ## what scheduling saves: tokens evaluated, loads and time, directly and through the proxy, on real servers
	$(GO) run ./bench/lanes
	$(GO) run ./bench/lanes -era 0.24.0

.PHONY: bench-fleet
bench-fleet: ## several proxies beside one, nginx and ollama-herd, on four real servers (Linux; 10 min)
	$(GO) run ./bench/fleet
	$(GO) run ./bench/fleet -model gen-llama-costly -runs 1

.PHONY: bench-fleet-sim
bench-fleet-sim: ## 64 servers, 8 proxies and 1,000 clients, simulated, in virtual time (10 min)
	$(GO) test -count 1 -timeout 1h -v ./bench/fleetsim -args -full

.PHONY: bench-contexts
bench-contexts: ## what stored contexts save: tokens evaluated and time, directly and through the proxy, on real servers (10 min each)
	$(GO) run ./bench/contexts
	$(GO) run ./bench/contexts -era 0.33.0

.PHONY: bench-coldstart
bench-coldstart: ## what learning the slots costs, on simulated servers, in virtual time (a minute)
	$(GO) test -count 1 -run TestTable -v ./bench/coldstart -args -all | grep -E '^ *\||^(FAIL|ok)'

.PHONY: bench-candidates
bench-candidates: ## 170,000 candidates and one rubric on simulated servers, in virtual time (minutes for each of the ways to run it)
	$(GO) test -c -o bin/candidates.test ./bench/candidates
	for mode in $$(seq 0 13); do \
		out=$$(bin/candidates.test -test.v -test.timeout 1h -candidates 170000 -mode $$mode) || { echo "$$out"; exit 1; }; \
		echo "$$out" | grep evaluated || exit 1; \
	done

.PHONY: bench-answerstores
bench-answerstores: ## four embedded databases under the load of stored answers (3 min; docs/answer-stores.md)
	cd bench/answerstores && $(GO) run . -vectors 100000 -answers 5000

.PHONY: fuzz
fuzz: ## a minute of each fuzz test
	$(FUZZ) '^FuzzParse$$' ./engine
	$(FUZZ) '^FuzzObject$$' ./jsonscan
	$(FUZZ) '^FuzzCursor$$' ./jsonscan
	$(FUZZ) '^FuzzRead$$' ./prefix
	$(FUZZ) '^FuzzMemory$$' ./contextstore
	$(FUZZ) '^FuzzEvent$$' ./contextstore
	$(FUZZ) '^FuzzTaken$$' ./shared
	$(FUZZ) '^FuzzLearned$$' ./shared
	$(FUZZ) '^FuzzParse$$' ./valkeyconn
	$(FUZZ) '^FuzzSplits$$' ./savings
	$(FUZZ) '^FuzzText$$' ./savings
	$(FUZZ) '^FuzzKindOf$$' ./savings
	$(FUZZ) '^FuzzNumCtx$$' ./proxy
	$(FUZZ) '^FuzzStableHeads$$' ./proxy
	$(FUZZ) '^FuzzQueue$$' ./schedule
	$(FUZZ) '^FuzzPassed$$' ./fleet
	$(FUZZ) '^FuzzKeepAlive$$' ./proxy
	$(FUZZ) '^FuzzForwarded$$' ./proxy
	$(FUZZ) '^FuzzNames$$' ./proxy
	$(FUZZ) '^FuzzKeys$$' ./proxy
	$(FUZZ) '^FuzzEvent$$' ./proxy
	$(FUZZ) '^FuzzTokens$$' ./ollamasim
	$(FUZZ) '^FuzzTemplate$$' ./batch
	$(FUZZ) '^FuzzLines$$' ./batch
	$(FUZZ) '^FuzzRows$$' ./batch
	$(FUZZ) '^FuzzJoined$$' ./batch
	$(FUZZ) '^FuzzSpan$$' ./batch
	$(FUZZ) '^FuzzAnswer$$' ./batch
	$(FUZZ) '^FuzzJob$$' ./batch
	$(FUZZ) '^FuzzEntry$$' ./answers
	$(FUZZ) '^FuzzParse$$' ./discover
	$(FUZZ) '^FuzzLegalName$$' ./cmd/ollama-cacheproxy

.PHONY: soak
soak: ## ten minutes of mixed clients and two real servers that are killed and revived: nothing lost, memory flat
	$(GO) run ./integration/cmd/soak -for 10m

# Linux, as root: partitions need network namespaces. More with ARGS, such as -sidecar or -real.
.PHONY: soak-fleet
soak-fleet: ## ten minutes of a fleet of which 20 things are killed, stopped and cut off: nothing lost, nothing sent twice
	$(GO) run ./integration/cmd/soakfleet -for 10m -faults 20 $(ARGS)

.PHONY: clean
clean: ## remove what was built here; the cache stays
	rm -rf bin
