# Redis that keeps every acknowledged write: append-only file, synced before each answer.
mkdir -p /data
if [ -e /dev/vda ]; then
    if mount -t ext4 /dev/vda /data; then
        echo "understudy: /data is on /dev/vda"
    else
        echo "understudy: /dev/vda has no ext4, /data is in memory"
    fi
fi
echo 1 > /proc/sys/vm/overcommit_memory
bind=${address%/*}
redis-server --bind "${bind:-0.0.0.0}" --port 6379 --protected-mode no --save "" --appendonly yes \
    --appendfsync always --auto-aof-rewrite-percentage 0 --tcp-keepalive 0 --dir /data 2>&1 |
while read -r line; do
    echo "redis: $line"
    case $line in *"Ready to accept connections"*) echo "understudy: redis ready" ;; esac
done
echo "understudy: redis ended"
setsid cttyhack sh
poweroff -f
