# Integers of all sizes, digests, and texts.
import hashlib
import json
import random


def say(*words):
    print("says:", *words)


rng = random.Random(2)
values = [0, 1, -1, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, -(2**64)]
values += [rng.getrandbits(n) - 2 ** (n - 1) for n in (8, 30, 60, 64, 100, 127, 128, 300)]
for a in values:
    say(a, [a + b for b in values], [a * b for b in values])
    say(a, [divmod(a, b) for b in values if b], [a & b for b in values], [a ^ b for b in values])
    say(a, a.bit_length(), [a >> n for n in (0, 1, 31, 32, 63, 64, 65)], [a << n for n in (1, 63, 65)], hash(a))
fib = [0, 1]
for _ in range(3000):
    fib = [fib[1], fib[0] + fib[1]]
say(hashlib.sha256(str(fib[0]).encode()).hexdigest(), fib[0] % (10**18 + 9), len(str(fib[1])))
factorial = 1
for i in range(1, 801):
    factorial *= i
say(hex(factorial)[:80], factorial % (2**89 - 1), sum(map(int, str(factorial))))
p = 2**521 - 1
for _ in range(10):
    a, e = rng.getrandbits(520), rng.getrandbits(300)
    say(pow(a, e, p), pow(a, -1, p) * a % p)
data = rng.randbytes(200_000)
for name in ("md5", "sha1", "sha256", "sha512", "sha3_256", "blake2b"):
    say(name, hashlib.new(name, data).hexdigest())
crc = 0xFFFFFFFF
for byte in data[:20_000]:
    crc ^= byte
    for _ in range(8):
        crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
say("crc", crc ^ 0xFFFFFFFF)
tree = {str(rng.random()): [rng.randrange(10**n) for n in range(1, 12)] for _ in range(30)}
text = json.dumps(tree, sort_keys=True)
say(text, json.loads(text) == tree)
say([rng.gauss(0, 1) > 0 for _ in range(60)], rng.sample(range(10**6), 20))
