# Data structures that move much memory, checked against slow and simple ways to the same end.
import array
import bisect
import hashlib
import heapq
import random


def say(*words):
    print("says:", *words)


rng = random.Random(3)
numbers = [rng.randrange(10**9) for _ in range(30_000)]
ordered = sorted(numbers)
heap = []
for n in numbers:
    heapq.heappush(heap, n)
say("heap", [heapq.heappop(heap) for _ in range(len(heap))] == ordered)
inserted = []
for n in numbers[:4000]:
    bisect.insort(inserted, n)
say("insort", inserted == sorted(numbers[:4000]))
table = {}
for i, n in enumerate(numbers):
    table[n % 5003] = table.get(n % 5003, 0) ^ (n << i % 40)
say("table", len(table), hashlib.sha256(repr(sorted(table.items())).encode()).hexdigest())
for code in "bBhHiIqQfd":
    a = array.array(code, [n % 120 for n in numbers[:5000]])
    view = memoryview(a).cast("B")
    shifted = bytearray(view)
    # Copies that overlap, at every alignment.
    for offset in range(1, 17):
        shifted[offset : offset + 9000 % len(shifted)] = shifted[: 9000 % len(shifted)]
    a.byteswap()
    say(code, sum(a) if code not in "fd" else len(a), hashlib.sha256(shifted).hexdigest(), hashlib.sha256(a.tobytes()).hexdigest())
sieve = bytearray([1]) * 300_000
for i in range(2, 548):
    if sieve[i]:
        sieve[i * i :: i] = bytes(len(range(i * i, len(sieve), i)))
say("primes", sum(sieve) - 2, hashlib.sha256(sieve).hexdigest())
words = "".join(chr(rng.choice((65, 228, 8364, 128512)) + rng.randrange(20)) for _ in range(20_000))
say("text", hashlib.sha256(words.encode("utf-16")).hexdigest(), words.encode().decode() == words, len(words.upper().split("A")))
