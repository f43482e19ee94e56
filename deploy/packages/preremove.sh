#!/bin/sh
# Runs before the files are removed. dpkg passes "remove" or "upgrade"; rpm passes 0 when it removes
# the last version. Debian's packages keep the setting whether a service is enabled until they are
# purged.
set -e

case "$1" in
remove) ;;
0) systemctl disable ollama-cacheproxy.service ;;
*) exit 0 ;;
esac
# There is no running systemd while an image is built.
[ ! -d /run/systemd/system ] || systemctl stop ollama-cacheproxy.service
