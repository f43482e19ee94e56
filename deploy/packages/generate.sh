#!/bin/sh
# generate.sh FOLDER makes the other files of packages: completions and the man page.
set -eu
out=$1
mkdir -p "$out"
program=$(mktemp)
trap 'rm -f "$program"' EXIT
# The man page's date is the commit's time from the build information.
CGO_ENABLED=0 go build -trimpath -buildvcs=true -o "$program" ./cmd/ollama-cacheproxy
for shell in bash zsh fish; do
	"$program" completion "$shell" >"$out/ollama-cacheproxy.$shell"
done
"$program" man >"$out/ollama-cacheproxy.1"
gzip -9 --no-name --keep --force "$out/ollama-cacheproxy.1"
