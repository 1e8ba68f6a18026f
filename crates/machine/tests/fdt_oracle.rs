//! The device tree against the one that QEMU makes for its `virt` board: the same nodes with the same properties.
//!
//! Needs the Debian packages qemu-system-misc and device-tree-compiler.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "qemu_oracle/cpu.rs"]
mod cpu;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use machine::board::fdt;
use machine::config::MachineConfig;

use cpu::CPU;

/// Properties by the path of their node; values as dtc prints them, phandles replaced by the paths they stand for.
type Tree = BTreeMap<String, BTreeMap<String, String>>;

/// Nodes of QEMU's board whose devices do not exist here. Newer versions of QEMU only have `pmu`.
const ABSENT: [&str; 5] = ["/platform-bus@", "/flash@", "/fw-cfg@", "/soc/pci@", "/pmu"];
/// Extensions that QEMU names and ours does not: parts and synonyms of others, and how profiles call what every machine like
/// this one does. Zihpm it has in earnest.
const UNNAMED: [&str; 21] = [
    "zic64b",
    "ziccamoa",
    "ziccif",
    "zicclsm",
    "ziccrse",
    "zihpm",
    "zmmul",
    "za64rs",
    "zaamo",
    "zalrsc",
    "shcounterenw",
    "shgatpa",
    "shtvala",
    "shvsatpa",
    "shvstvala",
    "shvstvecd",
    "ssccptr",
    "sscounterenw",
    "sstvala",
    "sstvecd",
    "ssu64xl",
];
const REFERENCES: [&str; 4] = ["regmap", "interrupt-parent", "cpu", "interrupts-extended"];

fn run(program: &str, package: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| {
        panic!("cannot run {program}: {e}; install the Debian package {package}")
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} failed: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn parse(blob: &Path) -> Tree {
    let source = run(
        "dtc",
        "device-tree-compiler",
        &["-q", "-I", "dtb", "-O", "dts", blob.to_str().unwrap()],
    );
    let mut tree = Tree::new();
    let mut path: Vec<&str> = vec![];
    for line in source.lines().map(str::trim) {
        if let Some(name) = line.strip_suffix(" {") {
            path.push(if name == "/" { "" } else { name });
            tree.entry(path.join("/")).or_default();
        } else if line == "};" {
            path.pop();
        } else if let Some(property) = line.strip_suffix(';').filter(|_| !path.is_empty()) {
            let (name, value) = property.split_once(" = ").unwrap_or((property, ""));
            tree.get_mut(&path.join("/")).unwrap().insert(name.into(), value.into());
        }
    }
    resolve(tree)
}

/// Replaces phandles, which may be numbered at will, by paths.
fn resolve(mut tree: Tree) -> Tree {
    let handle = |node: &BTreeMap<String, String>| {
        Some(node.get("phandle")?.trim_matches(['<', '>']).to_owned())
    };
    let paths: BTreeMap<String, String> =
        tree.iter().filter_map(|(path, node)| Some((handle(node)?, path.clone()))).collect();
    for node in tree.values_mut() {
        node.remove("phandle");
        for name in REFERENCES {
            let Some(value) = node.get_mut(name) else { continue };
            let cells = value.trim_matches(['<', '>']).split(' ').map(str::to_owned);
            let pairs = name == "interrupts-extended";
            let resolved = cells
                .enumerate()
                .map(|(i, cell)| if pairs && i % 2 == 1 { cell } else { paths[&cell].clone() });
            *value = resolved.collect::<Vec<_>>().join(" ");
        }
    }
    tree
}

/// A list of extensions, as dtc prints it, without those in [`UNNAMED`].
fn without_unnamed(list: &str, separator: &str) -> String {
    let names = list.trim_matches('"').split(separator);
    names.filter(|name| !UNNAMED.contains(name)).collect::<Vec<_>>().join(separator)
}

fn qemu(dir: &Path, harts: u8, ram_mib: u64) -> Tree {
    let blob = dir.join(format!("qemu-{harts}.dtb"));
    let machine = format!("virt,dumpdtb={}", blob.display());
    let (smp, ram) = (harts.to_string(), ram_mib.to_string());
    let args = ["-M", &machine, "-smp", &smp, "-m", &ram, "-cpu", CPU, "-display", "none"];
    run("qemu-system-riscv64", "qemu-system-misc", &args);
    parse(&blob)
}

fn ours(dir: &Path, harts: u8, ram_mib: u64) -> Tree {
    let config = MachineConfig {
        harts,
        ram_size: ram_mib << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![7; 32],
    };
    let blob = dir.join(format!("ours-{harts}.dtb"));
    std::fs::write(&blob, fdt::build(&config, "", None)).unwrap();
    parse(&blob)
}

fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

#[test]
fn device_tree_is_the_one_of_qemu_for_the_devices_that_exist() {
    for (harts, ram_mib) in [(1, 128), (2, 512), (8, 4096)] {
        let (qemu, ours) = (qemu(&scratch(), harts, ram_mib), ours(&scratch(), harts, ram_mib));
        let exists = |path: &&String| !ABSENT.iter().any(|absent| path.starts_with(absent));
        let qemu_nodes: BTreeSet<_> = qemu.keys().filter(exists).collect();
        assert_eq!(ours.keys().collect::<BTreeSet<_>>(), qemu_nodes);
        for path in qemu_nodes {
            let strip = |tree: &Tree| {
                let mut node = tree[path].clone();
                for (name, separator) in [("riscv,isa", "_"), ("riscv,isa-extensions", "\\0")] {
                    if let Some(value) = node.get_mut(name) {
                        *value = without_unnamed(value, separator);
                    }
                }
                if let Some(seed) = node.get_mut("rng-seed") {
                    *seed = seed.split(' ').count().to_string();
                }
                node
            };
            assert_eq!(strip(&ours), strip(&qemu), "node {path:?} with {harts} harts");
        }
    }
}

#[test]
fn disks_and_networks_are_found_in_the_order_of_their_slots() {
    let blob = scratch().join("order.dtb");
    let config = MachineConfig {
        harts: 1,
        ram_size: 64 << 20,
        nets: vec![],
        disks: vec![],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 0,
        rng_seed: vec![],
    };
    let tree = fdt::build(&config, "root=/dev/vda quiet", Some((0x8300_0000, 0x8310_0000)));
    std::fs::write(&blob, tree).unwrap();
    let args = ["-q", "-I", "dtb", "-O", "dts", blob.to_str().unwrap()];
    let source = run("dtc", "device-tree-compiler", &args);
    let slots: Vec<&str> = source.lines().filter(|line| line.contains("virtio_mmio@")).collect();
    assert_eq!(slots.len(), 8);
    assert!(slots.is_sorted());
    for line in [
        "bootargs = \"root=/dev/vda quiet\";",
        "linux,initrd-start = <0x00 0x83000000>;",
        "linux,initrd-end = <0x00 0x83100000>;",
    ] {
        assert!(source.contains(line), "{line} is missing in {source}");
    }
}
