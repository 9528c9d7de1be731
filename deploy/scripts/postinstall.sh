#!/bin/sh
# Of .deb and .rpm alike. dpkg says `configure` and the version before; rpm says 1 for a first installation, 2 for an upgrade.
set -e

service=kvm-notify-exporter.service

systemd-sysusers /usr/lib/sysusers.d/kvm-notify-exporter.conf
# The agent may write nothing below /usr: without this, each start and each lookup process compiles it anew.
python3 -m compileall -q /usr/lib/kvm-notify-exporter

case "$1" in
configure)
    # As dh_installsystemd has it: enabled at first, later as the administrator left it.
    if deb-systemd-helper --quiet was-enabled "$service"; then
        deb-systemd-helper enable "$service" >/dev/null
    else
        deb-systemd-helper update-state "$service" >/dev/null
    fi
    ;;
1) [ ! -d /run/systemd/system ] || systemctl --no-reload preset "$service" ;;
2) ;;
*) exit 0 ;;
esac

[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
if [ "$1" = configure ]; then
    # Starts what is enabled, unless policy-rc.d says no.
    deb-systemd-invoke "$([ -z "$2" ] && echo start || echo restart)" "$service" || true
fi
systemctl try-restart kvm-notify-exporter-no-admin.service
[ "$1" = configure ] || systemctl try-restart "$service"
