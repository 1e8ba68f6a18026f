# Floating point: results that IEEE 754 fixes bit by bit are printed exactly, those of a math library to 12 digits.
import math
import random
import struct


def say(*words):
    print("says:", *words)


def bits(x):
    return struct.pack(">d", x).hex() if x == x else "nan"


def attempt(f, *args):
    try:
        return f(*args)
    except (ValueError, OverflowError, ZeroDivisionError) as e:
        return type(e).__name__


def exact(x):
    return bits(x) if isinstance(x, float) else repr(x)


corner = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e16 + 1, math.inf, -math.inf, math.nan, 5e-324, -5e-324,
          2.2250738585072014e-308, 2.225073858507201e-308, 1.7976931348623157e308, 2.0**53, 2.0**53 + 2, 2.0**63, -(2.0**63),
          2.0**64, 1 / 3, 0.1, 1e-5, 123456789.123456789]
rng = random.Random(1)
wild = [struct.unpack(">d", rng.randbytes(8))[0] for _ in range(40)]
ops = [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul", lambda a, b: a * b), ("div", lambda a, b: a / b),
       ("mod", lambda a, b: a % b), ("fmod", math.fmod), ("remainder", math.remainder), ("copysign", math.copysign),
       ("nextafter", math.nextafter), ("floordiv", lambda a, b: a // b), ("lt", lambda a, b: a < b), ("eq", lambda a, b: a == b)]
for name, op in ops:
    for group in (corner, wild):
        say(name, *[exact(attempt(op, a, b)) for a, b in zip(group, group[7:] + group[:7])])
for a in corner:
    for name, op in ops[:4]:
        say(name, a.hex(), *[exact(attempt(op, a, b)) for b in corner])
for x in corner + wild:
    say(x.hex(), repr(x), *[exact(attempt(f, x)) for f in (math.sqrt, int, round, math.floor, math.ceil, math.trunc, math.ulp)])
    say(x.hex(), attempt(math.frexp, x), attempt(math.ldexp, x, -30), attempt(math.modf, x))
    say(x.hex(), attempt(lambda v: struct.pack(">f", v).hex(), x), attempt(lambda v: struct.pack(">e", v).hex(), x))
    say(x.hex(), "%.0f %.17g %e %r" % (x, x, x, attempt(lambda v: v.as_integer_ratio(), x)))
for text in ("0.1", "1e23", "8.5e-324", "2.4703282292062327208e-324", "9007199254740993", "1.7976931348623159e308", "4.35e-3"):
    say(text, bits(float(text)))
total = 0.0
for i in range(1, 20000):
    total += (-1.0) ** i / i
    total = math.sqrt(total * total + 1e-3) - 1e-3 / i
say("series", bits(total), bits(math.fsum(1.0 / i for i in range(1, 3000))), bits(sum(wild[i] * 0 == 0 for i in range(40)) / 7))
for i in range(120):
    x = rng.uniform(-20, 20)
    say("%.12e" % x, *["%.12e" % f(x) for f in (math.sin, math.cos, math.atan, math.exp, math.tanh, math.cbrt)],
        *["%.12e" % f(abs(x)) for f in (math.log, math.log10, math.lgamma)], "%.12e" % math.pow(abs(x), 1.7))
