# Installs Debian on /dev/vda from the packages on /dev/vdb, as debootstrap does and an administrator after it: essential
# packages unpacked by hand, all others by dpkg in the new system. What was asked for is in /install. This shell prefers
# busybox's programs, so that those of Debian have their paths.
target=/target
log=/tmp/log

step() { echo "understudy: step $*"; }
fail() {
    tail -n 25 $log
    reason=$(grep -E '^(E:|dpkg: error|.*[Ee]rror)' $log | tail -n 1)
    echo "understudy: failed: $*: ${reason:-$(tail -n 1 $log)}"
    poweroff -f
    sleep 60
}
# must WHAT COMMAND...: runs it; what it says is shown only if it fails.
must() {
    what=$1
    shift
    "$@" >> $log 2>&1 < /dev/null || fail "$what"
}
inside() {
    chroot $target /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb SYSTEMD_OFFLINE=1 \
        DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true INITRD=No "$@"
}
# Files of the packages named, as the new system sees them.
debs() {
    for name in "$@"; do sed -n "s|^$name \(.*\)|/mnt/\1|p" /install/packages; done
}
unpack() { /usr/bin/dpkg-deb --fsys-tarfile "/debs/$1" | /usr/bin/tar -x -p -f - --numeric-owner --keep-directory-symlink -C $target; }

boot=$(cat /install/boot)
[ -b /dev/vda ] && [ -b /dev/vdb ] || fail "no disks"

step "making file systems"
attributes=
[ $boot = extlinux ] && attributes=', attrs=LegacyBIOSBootable'
# The type of the second partition is that of a root file system on this architecture, which systemd-repart looks for.
/usr/sbin/sfdisk -q --wipe always /dev/vda > $log 2>&1 << END || fail partitioning
label: gpt
size=64MiB, type=uefi, name=esp
type=72EC70A6-CF74-40E6-BD49-4BDA08E8F224, name=root$attributes
END
must "making the ESP" /usr/sbin/mkfs.vfat -F 32 -n ESP /dev/vda1
must "making the root file system" /usr/sbin/mke2fs -q -F -t ext4 -L root /dev/vda2
mkdir -p $target /debs
# Nothing here has to outlive a crash before the end.
must "mounting" mount -t ext4 -o barrier=0,noauto_da_alloc /dev/vda2 $target
must "mounting the packages" mount -t ext4 -o ro /dev/vdb /debs

step "unpacking the base system"
for dir in bin sbin lib; do
    mkdir -p $target/usr/$dir
    ln -s usr/$dir $target/$dir
done
while read -r name deb; do must "unpacking $name" unpack "$deb"; done < /install/essential
mkdir -p $target/boot/efi $target/mnt $target/var/lib/dpkg/info $target/var/lib/dpkg/updates
: > $target/var/lib/dpkg/status
: > $target/var/lib/dpkg/available
must "mounting the ESP" mount -t vfat /dev/vda1 $target/boot/efi
for dir in dev proc sys; do must "mounting" mount -o bind /$dir $target/$dir; done
must "mounting" mount -o bind /debs $target/mnt
must "mounting" mount -t tmpfs run $target/run
mkdir -p $target/dev/pts $target/dev/disk/by-uuid
mount -t devpts devpts $target/dev/pts
printf '#!/bin/sh\nexit 101\n' > $target/usr/sbin/policy-rc.d
chmod 755 $target/usr/sbin/policy-rc.d
cp /install/hostname $target/etc/hostname
printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n\n::1\tlocalhost ip6-localhost ip6-loopback\n' "$(cat /install/hostname)" \
    > $target/etc/hosts

step "setting the base system up"
options="--force-depends --force-unsafe-io --force-confold"
for names in base-passwd base-files "libc6 libc-bin" perl-base "debconf mawk dpkg"; do
    must "installing $names" inside dpkg $options --install $(debs $names)
done
echo UTC > $target/etc/timezone
[ -e $target/etc/localtime ] || ln -s /usr/share/zoneinfo/Etc/UTC $target/etc/localtime

uuid_root=$(inside blkid -s UUID -o value /dev/vda2)
uuid_esp=$(inside blkid -s UUID -o value /dev/vda1)
ln -sf ../../vda2 $target/dev/disk/by-uuid/$uuid_root
ln -sf ../../vda1 $target/dev/disk/by-uuid/$uuid_esp
cat > $target/etc/fstab << END
UUID=$uuid_root / ext4 errors=remount-ro,x-systemd.growfs 0 1
UUID=$uuid_esp /boot/efi vfat umask=0077 0 2
END
mkdir -p $target/etc/repart.d $target/etc/default/grub.d $target/etc/systemd/network
printf '# Lets the root partition grow when the disk was enlarged.\n[Partition]\nType=root\n' > $target/etc/repart.d/50-root.conf
cat > $target/etc/default/grub.d/serial-console.cfg << END
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=ttyS0"
GRUB_TERMINAL=console
GRUB_TIMEOUT=1
END
printf 'U_BOOT_PARAMETERS="console=ttyS0"\nU_BOOT_ROOT="root=UUID=%s"\nU_BOOT_TIMEOUT="10"\n' $uuid_root > $target/etc/default/u-boot
printf '[Match]\nName=en* eth*\n\n[Network]\nDHCP=yes\n' > $target/etc/systemd/network/80-dhcp.network
printf '%s\n' 'grub-efi-riscv64 grub2/force_efi_extra_removable boolean true' \
    'grub-efi-riscv64 grub2/update_nvram boolean false' > $target/run/answers
must "answering questions" inside debconf-set-selections /run/answers

step "unpacking $(grep -c . /install/packages) packages"
must "unpacking" inside dpkg $options --unpack --recursive /mnt
step "setting the packages up"
must "setting up" inside dpkg $options --configure -a

step "making the initial RAM disk"
must "making the initial RAM disk" inside update-initramfs -c -k all
step "installing the boot loader"
case $boot in
efi)
    must "grub-install" inside grub-install --target=riscv64-efi --efi-directory=/boot/efi --removable --no-nvram
    must "update-grub" inside update-grub
    ;;
extlinux)
    must "u-boot-update" inside u-boot-update
    ;;
esac

step "writing the configuration"
must "enabling the network" inside systemctl enable systemd-networkd.service ssh.service
rm -f $target/etc/apt/sources.list
cp /install/debian.sources $target/etc/apt/sources.list.d/debian.sources
if [ -e /install/authorized_keys ]; then
    mkdir -p -m 700 $target/root/.ssh
    cp /install/authorized_keys $target/root/.ssh/authorized_keys
    chmod 600 $target/root/.ssh/authorized_keys
fi
if [ -e /install/password ]; then
    inside chpasswd < /install/password >> $log 2>&1 || fail "setting root's password"
fi
must "finishing" inside /usr/lib/systemd/systemd-update-done
# Each machine made from the image draws its own.
: > $target/etc/machine-id
rm -f $target/var/lib/dbus/machine-id $target/usr/sbin/policy-rc.d $target/var/lib/systemd/random-seed
rm -f $target/var/cache/debconf/*-old $target/var/lib/dpkg/*-old

step "finishing"
for dir in dev/pts run mnt sys proc dev boot/efi; do umount $target/$dir; done
must "unmounting" umount $target
sync
echo "understudy: installed"
poweroff -f
sleep 60
