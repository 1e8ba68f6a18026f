// Arithmetic whose results a replay has to repeat bit by bit: integers, bits, AES and SHA, floating point in every
// rounding mode with its flags.
#include "guest.h"

static u64 state = 0x2545f4914f6cdd1d;
static u64 random64(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

#define RR(h, op, a, b) do { u64 r_; __asm__ volatile(op " %0, %1, %2" : "=r"(r_) : "r"(a), "r"(b)); h = mix(h, r_); } while (0)
#define R1(h, op, a) do { u64 r_; __asm__ volatile(op " %0, %1" : "=r"(r_) : "r"(a)); h = mix(h, r_); } while (0)

static u64 integers(u64 h, u64 a, u64 b) {
    RR(h, "mul", a, b); RR(h, "mulh", a, b); RR(h, "mulhu", a, b); RR(h, "mulhsu", a, b); RR(h, "mulw", a, b);
    RR(h, "div", a, b); RR(h, "divu", a, b); RR(h, "rem", a, b); RR(h, "remu", a, b);
    RR(h, "divw", a, b); RR(h, "divuw", a, b); RR(h, "remw", a, b); RR(h, "remuw", a, b);
    RR(h, "sll", a, b); RR(h, "sra", a, b); RR(h, "sraw", a, b); RR(h, "sltu", a, b);
    return h;
}

static u64 bits(u64 h, u64 a, u64 b) {
    RR(h, "sh1add", a, b); RR(h, "sh2add.uw", a, b); RR(h, "sh3add", a, b); RR(h, "add.uw", a, b);
    RR(h, "andn", a, b); RR(h, "orn", a, b); RR(h, "xnor", a, b); RR(h, "max", a, b); RR(h, "minu", a, b);
    RR(h, "rol", a, b); RR(h, "rorw", a, b); RR(h, "bclr", a, b); RR(h, "bext", a, b); RR(h, "binv", a, b);
    RR(h, "clmul", a, b); RR(h, "clmulh", a, b); RR(h, "clmulr", a, b);
    RR(h, "pack", a, b); RR(h, "packh", a, b); RR(h, "xperm4", a, b); RR(h, "xperm8", a, b);
    R1(h, "clz", a); R1(h, "ctzw", a); R1(h, "cpop", a); R1(h, "rev8", a); R1(h, "orc.b", a);
    R1(h, "sext.b", a); R1(h, "zext.h", a); R1(h, "brev8", a);
    u64 zero;
    __asm__ volatile(".insn r 0x33, 5, 7, %0, %1, %2" : "=r"(zero) : "r"(a), "r"(b & 1));    // czero.eqz
    return mix(h, zero);
}

static u64 crypto(u64 h, u64 a, u64 b) {
    RR(h, "aes64es", a, b); RR(h, "aes64esm", a, b); RR(h, "aes64ds", a, b); RR(h, "aes64dsm", a, b);
    RR(h, "aes64ks2", a, b); R1(h, "aes64im", a);
    R1(h, "sha256sig0", a); R1(h, "sha256sum1", a); R1(h, "sha512sig1", a); R1(h, "sha512sum0", a);
    return h;
}

#define F3(h, type, op, a, b) do { type r_; u64 v_; __asm__ volatile(op " %0, %2, %3\n fmv.x.d %1, %0" : "=&f"(r_), "=r"(v_) : "f"(a), "f"(b)); h = mix(h, v_); } while (0)
#define F4(h, type, op, a, b, c) do { type r_; u64 v_; __asm__ volatile(op " %0, %2, %3, %4\n fmv.x.d %1, %0" : "=&f"(r_), "=r"(v_) : "f"(a), "f"(b), "f"(c)); h = mix(h, v_); } while (0)
#define F2(h, type, op, a) do { type r_; u64 v_; __asm__ volatile(op " %0, %2\n fmv.x.d %1, %0" : "=&f"(r_), "=r"(v_) : "f"(a)); h = mix(h, v_); } while (0)
#define FX(h, op, a) do { u64 v_; __asm__ volatile(op " %0, %1" : "=r"(v_) : "f"(a)); h = mix(h, v_); } while (0)
#define FXX(h, op, a, b) do { u64 v_; __asm__ volatile(op " %0, %1, %2" : "=r"(v_) : "f"(a), "f"(b)); h = mix(h, v_); } while (0)
#define XF(h, op, a) do { double r_; u64 v_; __asm__ volatile(op " %0, %2\n fmv.x.d %1, %0" : "=&f"(r_), "=r"(v_) : "r"(a)); h = mix(h, v_); } while (0)

#define FLOATS(name, type, s) \
    static u64 name(u64 h, type a, type b) { \
        F3(h, type, "fadd." s, a, b); F3(h, type, "fsub." s, a, b); F3(h, type, "fmul." s, a, b); F3(h, type, "fdiv." s, a, b); \
        F3(h, type, "fmin." s, a, b); F3(h, type, "fmax." s, a, b); F3(h, type, "fsgnjx." s, a, b); \
        F4(h, type, "fmadd." s, a, b, a); F4(h, type, "fmsub." s, a, b, b); F4(h, type, "fnmadd." s, a, b, a); F4(h, type, "fnmsub." s, b, a, a); \
        F2(h, type, "fsqrt." s, a); FX(h, "fclass." s, a); \
        FX(h, "fcvt.w." s, a); FX(h, "fcvt.wu." s, a); FX(h, "fcvt.l." s, a); FX(h, "fcvt.lu." s, a); \
        FXX(h, "feq." s, a, b); FXX(h, "flt." s, a, b); FXX(h, "fle." s, a, b); \
        return h; \
    }
FLOATS(doubles, double, "d")
FLOATS(singles, float, "s")

static double as_double(u64 v) { double d; __asm__("fmv.d.x %0, %1" : "=f"(d) : "r"(v)); return d; }
static float as_float(u64 v) { float f; __asm__("fmv.w.x %0, %1" : "=f"(f) : "r"(v)); return f; }

static const u64 SPECIAL[] = {
    0, 1ul << 63, 1, 0xffffffffffffful, 0x10000000000000, 0x3ff0000000000000, 0xbff0000000000001, 0x4340000000000001,
    0x43e0000000000000, 0xc3e0000000000001, 0x7fefffffffffffff, 0x7ff0000000000000, 0xfff0000000000000,
    0x7ff8000000000000, 0x7ff0000000000001, 0x3810000000000001, 0x36a0000000000000, 0x47efffffefffffff,
};
#define SPECIALS (sizeof SPECIAL / sizeof *SPECIAL)

static u64 floats(u64 h, u64 x, u64 y) {
    double a = as_double(x), b = as_double(y);
    h = doubles(h, a, b);
    h = singles(h, as_float(x >> 32 ^ x), as_float(y >> 32 ^ y));
    F2(h, float, "fcvt.s.d", a);
    F2(h, double, "fcvt.d.s", as_float(x));
    XF(h, "fcvt.d.l", x); XF(h, "fcvt.d.lu", x); XF(h, "fcvt.s.w", x); XF(h, "fcvt.s.lu", x);
    double r;
    __asm__ volatile(".insn r 0x53, 2, 0x15, %0, %1, %2" : "=f"(r) : "f"(a), "f"(b));          // fminm.d
    FX(h, "fmv.x.d", r);
    __asm__ volatile(".insn r 0x53, 7, 0x21, %0, %1, f4" : "=f"(r) : "f"(a));                  // fround.d
    FX(h, "fmv.x.d", r);
    return h;
}

void test_compute(u32 rounds) {
    u64 h = 0, f = 0, flags = 0;
    for (u32 i = 0; i < rounds; i++) {
        u64 a = random64(), b = i % 4 ? random64() : i % 8;
        h = crypto(bits(integers(h, a, b), a, b), a, b);
    }
    print_hex("compute: integers ", h);
    for (u64 mode = 0; mode < 5; mode++) {
        csr_write(fcsr, mode << 5);
        for (u32 i = 0; i < SPECIALS; i++) {
            for (u32 k = 0; k < SPECIALS; k++) f = floats(f, SPECIAL[i], SPECIAL[k]);
        }
        for (u32 i = 0; i < rounds; i++) f = floats(f, random64(), random64());
        flags = flags << 8 | csr_read(fcsr);
    }
    csr_write(fcsr, 0);
    print_hex("compute: floats ", f);
    print_hex("compute: flags ", flags);
}
