#!/bin/sh
# Before the files are gone. dpkg says "remove", or "upgrade"; rpm says 0 when it is the last version
# that goes. Whether it starts by itself is a setting, which Debian's packages keep until they are purged.
set -e

case "$1" in
remove) ;;
0) systemctl disable ollama-cacheproxy.service ;;
*) exit 0 ;;
esac
# No systemd runs in an image that is being built.
[ ! -d /run/systemd/system ] || systemctl stop ollama-cacheproxy.service
