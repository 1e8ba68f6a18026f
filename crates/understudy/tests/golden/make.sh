#!/bin/sh
# Makes one golden recording. See README.md.
set -eu

if [ $# -lt 4 ]; then
    echo "usage: $0 UNDERSTUDY NAME HARTS kernel|firmware [OPTION OF run]..." >&2
    exit 2
fi
if [ -z "${GOLDEN_INSIDE:-}" ]; then
    # A network of its own, that is gone afterwards.
    user=
    [ "$(id -u)" = 0 ] || user=--map-root-user
    GOLDEN_INSIDE=1 exec unshare $user --net -- "$0" "$@"
fi
understudy=$(command -v "$1")
name=$2 harts=$3 flavour=$4
shift 4
cd "$(dirname "$0")"
if [ -e "$name" ]; then
    echo "$PWD/$name is there already" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

extensions=zba_zbb_zbc_zbs_zbkb_zbkc_zbkx_zknd_zkne_zknh
guest() {
    riscv64-linux-gnu-gcc -march=rv64gc_$extensions -mabi=lp64d -mcmodel=medany -Os -Wall -Wextra -Werror \
        -ffreestanding -fno-builtin -fno-pic -fno-tree-loop-distribute-patterns -static -nostdlib -s \
        -Wl,--build-id=none -Wl,--no-warn-rwx-segments -Wl,-T,guest/link.ld "$@" guest/start.S guest/*.c
}
if [ "$flavour" = firmware ]; then
    guest -DFIRMWARE -Wl,--defsym=BASE=0x80000000 -o "$work/elf"
    riscv64-linux-gnu-objcopy -O binary "$work/elf" "$work/boot"
    boot=--bios
else
    guest -Wl,--defsym=BASE=0x80200000 -o "$work/boot"
    boot=--kernel
fi

# A disk with something on it, behind a first sector of zeros.
awk 'BEGIN { for (i = 64; i < 131072; i++) printf "%07x\n", i * 40503 % 268435456 }' > "$work/text"
{ head -c 512 /dev/zero; cat "$work/text"; } > "$work/disk"

ip link set lo up
ip link add golden0 type bridge forward_delay 0
ip addr add 10.97.9.1/24 dev golden0
ip link set golden0 up

# Typed in pieces, so that the machine goes on now and then.
{ sleep 1; for piece in "hel" "lo," " gol"; do printf %s "$piece"; sleep 1; done; echo den; sleep 2; } |
    "$understudy" run --memory 32M --smp "$harts" $boot "$work/boot" --disk "path=$work/disk" --net bridge=golden0 \
        --record "$name" --digest-interval 2 "$@" > "$work/live"
"$understudy" replay "$name" > "$work/console" 2> "$work/words"
cat "$work/words" >&2
# A recording that was limited has lost the beginning.
if ! tail -c "$(wc -c < "$work/console")" "$work/live" | cmp -s - "$work/console"; then
    echo "the replay's console is not the end of the live one" >&2
    exit 1
fi
{
    sed -n 's/^replayed \([0-9]*\) steps\(.*\), \([0-9]*\) records; \([0-9]*\) digests.*/steps \1\2\nrecords \3\ndigests \4\ndigest 0\n/p' "$work/words"
    cat "$work/console"
} > "$name.txt"
chmod -R u=rwX,go=rX "$name"
