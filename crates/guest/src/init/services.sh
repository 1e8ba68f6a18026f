# PostgreSQL, Redis and iperf3, then commands from the console.
stty -echo
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
chmod 1777 /tmp /dev/shm
mkdir -p /data
if [ -e /dev/vda ]; then
    if mount -t ext4 /dev/vda /data; then
        echo "understudy: /data is on /dev/vda"
    else
        echo "understudy: /dev/vda has no ext4, /data is in memory"
    fi
fi
echo 1 > /proc/sys/vm/overcommit_memory

export LC_ALL=C TZ=UTC
as_postgres() {
    (cd /data && HOME=/data exec /usr/bin/setpriv --reuid=100 --regid=100 --clear-groups "$@")
}
postgres=/usr/lib/postgresql/17/bin
mkdir -p /run/postgresql
chown 100:100 /data /run/postgresql
if [ ! -e /data/postgresql/PG_VERSION ]; then
    echo "understudy: the database is made"
    as_postgres $postgres/initdb -D /data/postgresql -U postgres -A trust --locale=C -E UTF8 > /tmp/initdb 2>&1 ||
        cat /tmp/initdb
    cat >> /data/postgresql/pg_hba.conf << END
host all all 0.0.0.0/0 trust
END
    cat >> /data/postgresql/postgresql.conf << END
listen_addresses = '*'
shared_buffers = 128MB
max_connections = 100
unix_socket_directories = '/run/postgresql'
END
fi
# A machine that lost its power leaves it.
rm -f /data/postgresql/postmaster.pid
as_postgres $postgres/postgres -D /data/postgresql > /tmp/postgres.log 2>&1 &
until as_postgres $postgres/psql -h /run/postgresql -U postgres -Atqc 'select 1' > /dev/null 2>&1; do
    if [ ! -d /proc/$! ]; then
        cat /tmp/postgres.log
        echo "understudy: postgresql ended"
        break
    fi
    sleep 0.2
done
[ ! -d /proc/$! ] || echo "understudy: postgresql ready"

redis-server --bind 0.0.0.0 --port 6379 --protected-mode no --save "" --appendonly no --tcp-keepalive 0 \
    --daemonize yes --dir /tmp > /tmp/redis.log 2>&1 && echo "understudy: redis ready"
iperf3 -s -D > /tmp/iperf3.log 2>&1 && echo "understudy: iperf3 ready"
echo "understudy: services ready"

while read -r name command; do
    [ "$name" != end ] || break
    echo "understudy: run $name"
    sh -c "$command" < /dev/null
    echo "understudy: exit $? $name"
done
as_postgres $postgres/pg_ctl -D /data/postgresql -m fast -w stop > /dev/null
wait
umount /data
poweroff -f
