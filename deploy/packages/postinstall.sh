#!/bin/sh
# After the files are there. dpkg says "configure" and the version that was there before (none at
# first); rpm says 1 at first, 2 for an upgrade.
set -e

case "$1" in
configure) [ -z "$2" ] && first=yes || first= ;;
1) first=yes ;;
2) first= ;;
*) exit 0 ;;
esac

systemd-sysusers ollama-cacheproxy.conf
# Whether services start by themselves is for the distribution to say: Debian's do, Fedora's do not.
[ -z "$first" ] || systemctl preset ollama-cacheproxy.service

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	if systemctl --quiet is-enabled ollama-cacheproxy.service; then
		systemctl restart ollama-cacheproxy.service
	else
		systemctl try-restart ollama-cacheproxy.service
	fi
fi
