#!/bin/busybox sh
# /init of the lab: mounts what a host has mounted, loads KVM, carries out the job, powers off.
/bin/busybox --install -s /bin
export PATH=/usr/bin:/usr/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mount -t securityfs securityfs /sys/kernel/security
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
ln -s /proc/self/fd /dev/fd
for module in $(cat /lab/modules/order); do
    insmod "/lab/modules/$module.ko" || echo "lab: $module cannot be loaded"
done
cd /project && python3 tests/lab/guest_job.py || echo "lab: the job ended with status $?"
poweroff -f
