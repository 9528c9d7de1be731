#!/bin/sh
# dpkg says `remove` or `upgrade`; rpm says how many versions stay: 0 for a removal, 1 for an upgrade.
set -e

# What postinstall compiled belongs to no package.
find /usr/lib/kvm-notify-exporter -name __pycache__ -type d -prune -exec rm -rf {} +

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac

[ -d /run/systemd/system ] || exit 0
# The socket first: it would start the service again.
units="kvm-notify-exporter.socket kvm-notify-exporter.service kvm-notify-exporter-no-admin.service"
# shellcheck disable=SC2086 # a list of words
systemctl --no-reload stop $units
# shellcheck disable=SC2086
[ "$1" != 0 ] || systemctl --no-reload disable $units
