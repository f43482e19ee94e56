#!/bin/sh
# Runs after the files are removed. The user stays, since a later user must not inherit its other
# files.
set -e

[ "$1" != purge ] || rm -f /etc/systemd/system/multi-user.target.wants/ollama-cacheproxy.service
[ ! -d /run/systemd/system ] || systemctl daemon-reload
