#!/bin/busybox sh
# First process of every Understudy guest: mounts, modules in order, network, then the guest's own part.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /tmp /run /dev/shm
for module in $(cat /modules/order); do
    insmod /modules/$module || echo "understudy: module $module does not load"
done

param() {
    # Value of `understudy.NAME=VALUE` on the kernel command line.
    for word in $(cat /proc/cmdline); do
        case $word in understudy.$1=*) echo "${word#*=}" ;; esac
    done
}

echo 0 > /proc/sys/kernel/printk_ratelimit
hostname understudy
ip link set lo up
address=$(param ip)
if [ -n "$address" ] && [ -e /sys/class/net/eth0 ]; then
    [ -e /proc/sys/net/ipv6/conf/eth0/disable_ipv6 ] && echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6
    ip link set eth0 up
    ip addr add "$address" dev eth0
    gateway=$(param gw)
    [ -n "$gateway" ] && ip route add default via "$gateway"
fi
echo "understudy: up on $(uname -r) $(uname -m), $(nproc) harts"
. /guest.sh
