"""Objects, dictionaries, lists and strings, as scripts use them."""


class Node:
    __slots__ = ("key", "left", "right")

    def __init__(self, key):
        self.key, self.left, self.right = key, None, None


def insert(root, key):
    while True:
        side = "left" if key < root.key else "right"
        child = getattr(root, side)
        if child is None:
            setattr(root, side, Node(key))
            return
        root = child


def depth(node):
    return 0 if node is None else 1 + max(depth(node.left), depth(node.right))


def numbers(count, state=12345):
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2147483648
        yield state


def primes(limit):
    sieve = bytearray([1]) * (limit + 1)
    for i in range(2, int(limit**0.5) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, limit + 1, i)))
    return [i for i in range(2, limit) if sieve[i]]


root = Node(1 << 30)
for number in numbers(6000):
    insert(root, number)
words = {}
for number in numbers(25000):
    word = f"w{number % 997:03d}"
    words[word] = words.get(word, 0) + len(word)
lines = ["%s=%d" % pair for pair in sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))]
text = ",".join(lines)
total = sum(int(part.split("=")[1]) for part in text.split(","))
cubes = {i: i * i * i % 7919 for i in range(30000)}
print(depth(root), total, len(primes(60000)), sum(cubes.values()), hash((1, 2.5)) % 97)
