#!/bin/sh
# Runs after the files are installed. dpkg passes "configure" and the previous version (empty for a
# first install); rpm passes 1 for a first install, 2 for an upgrade.
set -e

case "$1" in
configure) [ -z "$2" ] && first=yes || first= ;;
1) first=yes ;;
2) first= ;;
*) exit 0 ;;
esac

systemd-sysusers ollama-cacheproxy.conf
# The distribution decides whether services start by themselves: Debian's do, Fedora's do not.
[ -z "$first" ] || systemctl preset ollama-cacheproxy.service

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	if systemctl --quiet is-enabled ollama-cacheproxy.service; then
		systemctl restart ollama-cacheproxy.service
	else
		systemctl try-restart ollama-cacheproxy.service
	fi
fi
