#!/bin/sh
# dpkg says `remove`, `purge` and more; rpm says how many versions stay. The user stays: a file may be its own, and a new user
# would get its number.
set -e

case "$1" in
purge)
    rm -rf /var/lib/kvm-notify-exporter
    for unit in kvm-notify-exporter.socket kvm-notify-exporter.service kvm-notify-exporter-no-admin.service; do
        if command -v deb-systemd-helper >/dev/null; then
            deb-systemd-helper purge "$unit" >/dev/null
        fi
    done
    ;;
esac
[ ! -d /run/systemd/system ] || systemctl daemon-reload
