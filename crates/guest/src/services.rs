//! The guest with the services that people protect: a database, a store, a compiler, and what measures disks and networks.

use crate::BuildGuestError;
use crate::cpio::FileTree;
use crate::image::Packages;

/// What the programs come from.
pub(crate) const PACKAGES: &[&str] = &[
    "busybox-static",
    "binutils",
    "fio",
    "gcc-14",
    "iperf3",
    "libc6-dev",
    "postgresql-17",
    "redis-server",
    "util-linux",
];
/// Starts of the names of packages that these depend on for uses that the guest does not have.
pub(crate) const LEFT_OUT: &[&str] = &[
    "adduser",
    "debconf",
    "libasan",
    "libc-l10n",
    "libio-pty-perl",
    "libipc-run-perl",
    "libjson-perl",
    "liblsan",
    "libperl",
    "libpython3",
    "libtext-",
    "libtsan",
    "libubsan",
    "linux-libc-dev",
    "locales",
    "media-types",
    "passwd",
    "perl",
    "postgresql-common",
    "python3",
    "ssl-cert",
    "ucf",
];
/// Size of the disk that PostgreSQL keeps its data on.
pub(crate) const DISK_BYTES: u64 = 1 << 30;
/// PostgreSQL's programs; it looks for what it needs in places that it knows from theirs.
const POSTGRES: &str = "usr/lib/postgresql/17/bin";
const PROGRAMS: &[&str] = &[
    "usr/bin/fio",
    "usr/bin/iperf3",
    "usr/bin/redis-server",
    "usr/bin/riscv64-linux-gnu-as",
    "usr/bin/riscv64-linux-gnu-gcc-14",
    "usr/bin/setpriv",
    "usr/libexec/gcc/riscv64-linux-gnu/14/cc1",
];
/// Functions in the file that the compiler gets.
const WORK_FUNCTIONS: u32 = 12;

/// Adds the programs; those that busybox has too come before its names.
pub(crate) fn add_programs(
    tree: &mut FileTree,
    packages: &Packages,
) -> Result<(), BuildGuestError> {
    for program in PROGRAMS {
        packages.add_program(tree, program)?;
    }
    for program in ["initdb", "pg_ctl", "postgres", "psql"] {
        packages.add_program(tree, &format!("{POSTGRES}/{program}"))?;
    }
    tree.add_symlink("usr/bin/gcc", "riscv64-linux-gnu-gcc-14");
    tree.add_symlink("usr/bin/as", "riscv64-linux-gnu-as");
    // Loaded at run time, when a thread ends.
    packages.add_library(tree, "libgcc_s.so.1")?;
    for dir in [
        "usr/include",
        "usr/lib/gcc/riscv64-linux-gnu/14/include",
        "usr/lib/postgresql/17/lib",
        "usr/share/postgresql/17",
    ] {
        packages.add_dir(tree, dir);
    }
    // PostgreSQL complains about its absence; UTC is all that the guest has.
    tree.add_dir("usr/share/zoneinfo");
    tree.add_file("etc/passwd", 0o644, PASSWD.into());
    tree.add_file("etc/group", 0o644, "root:x:0:\npostgres:x:100:\n".into());
    tree.add_file("srv/work.c", 0o644, compiler_work().into());
    Ok(())
}

/// PostgreSQL does not run as root.
const PASSWD: &str = "root:x:0:0::/:/bin/sh\npostgres:x:100:100::/data:/bin/sh\n";

/// The C file that is compiled in the guest and beside it: a page of loops, branches and calls, many times over, with other
/// numbers each time. The same text each time; it includes nothing.
#[must_use]
pub fn compiler_work() -> String {
    let mut text = String::from("struct node { struct node *next; long key; double weight; };\n");
    for n in 0..WORK_FUNCTIONS {
        let (a, b, c) = (n * 7 % 31 + 3, n * 13 % 61 + 5, n * 29 % 127 + 2);
        let function = WORK
            .replace("@N", &n.to_string())
            .replace("@A", &a.to_string())
            .replace("@B", &b.to_string())
            .replace("@C", &c.to_string());
        text.push_str(&function);
    }
    text.push_str(
        "long work(struct node *list, long *table, unsigned char *text, long count)\n{\n",
    );
    text.push_str("    long sum = 0;\n");
    for n in 0..WORK_FUNCTIONS {
        text.push_str(&format!("    sum += mix_{n}(list, table, text, count);\n"));
    }
    text + "    return sum;\n}\n"
}

const WORK: &str = "
static long step_@N(long value, unsigned kind)
{
    switch (kind % 6) {
    case 0: return value * @A + @B;
    case 1: return (value << 3) ^ (value >> @A);
    case 2: return value / @B + value % @C;
    case 3: return value & 1 ? value * 3 + 1 : value / 2;
    case 4: return -value + @C;
    default: return value ^ 0x5bd1e995L * @A;
    }
}

static double weigh_@N(const struct node *list, double scale)
{
    double sum = 0;
    for (const struct node *at = list; at; at = at->next) {
        if (at->key % @B == 0)
            sum += at->weight * scale;
        else if (at->key % @A == 1)
            sum -= at->weight / (scale + @C);
        else
            sum *= 1.0 + 1.0 / @B;
    }
    return sum;
}

long mix_@N(struct node *list, long *table, unsigned char *text, long count)
{
    long sum = @C, grid[@A][@A];
    for (int row = 0; row < @A; row++)
        for (int column = 0; column < @A; column++)
            grid[row][column] = table[(row * @B + column) % count] + row * column;
    for (int k = 0; k < @A; k++)
        for (int row = 0; row < @A; row++)
            for (int column = 0; column < @A; column++) {
                long way = grid[row][k] + grid[k][column];
                if (way < grid[row][column])
                    grid[row][column] = way;
            }
    for (long i = 0; i < count; i++) {
        unsigned kind = text[i] * @B + text[(i + @A) % count];
        sum = step_@N(sum, kind) + step_@N(table[i], kind >> 3);
        if (text[i] == '@' && i + @A < count)
            text[i + @A] ^= (unsigned char)(sum >> @A % 8);
        table[(sum & 0x7fffffff) % count] += grid[i % @A][kind % @A];
    }
    for (struct node *at = list, *next; at; at = next) {
        next = at->next;
        while (next && next->key == at->key) {
            at->weight += next->weight;
            next = at->next = next->next;
        }
        at->key = step_@N(at->key, (unsigned)sum);
    }
    return sum + (long)weigh_@N(list, sum % @C + 0.5);
}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_has_no_place_left_open() {
        let text = compiler_work();
        assert!(!["@N", "@A", "@B", "@C"].iter().any(|mark| text.contains(mark)));
        assert_eq!(text.matches("\nlong mix_").count(), WORK_FUNCTIONS as usize);
        assert_eq!(text, compiler_work());
    }
}
