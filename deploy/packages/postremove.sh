#!/bin/sh
# After the files are gone. The user stays: what it owns elsewhere must not become somebody else's.
set -e

[ "$1" != purge ] || rm -f /etc/systemd/system/multi-user.target.wants/ollama-cacheproxy.service
[ ! -d /run/systemd/system ] || systemctl daemon-reload
