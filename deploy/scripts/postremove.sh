#!/bin/sh
# dpkg says `remove`, `purge` and more; rpm says how many versions stay. The user stays: a file may be its own, and a new user
# would get its number.
set -e

case "$1" in
purge)
    for unit in kvm-notify-exporter.service kvm-notify-exporter-no-admin.service; do
        [ ! -x /usr/bin/deb-systemd-helper ] || deb-systemd-helper purge "$unit" >/dev/null
    done
    ;;
esac
[ ! -d /run/systemd/system ] || systemctl daemon-reload
