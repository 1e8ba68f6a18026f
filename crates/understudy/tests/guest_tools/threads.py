# Threads and processes: what they make together has one right answer.
import hashlib
import os
import signal
import threading


def say(*words):
    print("says:", *words, flush=True)


lock, total, turns = threading.Lock(), [0], []
gate = threading.Barrier(4)


def add(n):
    gate.wait()
    for i in range(500):
        with lock:
            total[0] += i * n
            turns.append(n)


threads = [threading.Thread(target=add, args=(n,)) for n in range(1, 5)]
for t in threads:
    t.start()
for t in threads:
    t.join()
say("sum", total[0], sorted(turns) == sorted([1, 2, 3, 4] * 500))

results = {}
for n in range(6):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        digest = hashlib.sha256(bytes([n]) * (50_000 + n)).hexdigest()
        os.write(write, digest.encode())
        os._exit(n)
    os.close(write)
    results[n] = (pid, read)
for n, (pid, read) in sorted(results.items()):
    text = os.read(read, 100).decode()
    say("child", n, text, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

seen = []
signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
for _ in range(50):
    os.kill(os.getpid(), signal.SIGUSR1)
say("signals", len(seen), {int(s) for s in seen} == {int(signal.SIGUSR1)})
