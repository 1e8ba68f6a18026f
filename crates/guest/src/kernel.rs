//! Takes the kernel and the modules that a guest needs out of Debian's kernel package.
//!
//! The kernel's bytes stay Debian's: on riscv64 the package holds an uncompressed `Image` (with an EFI stub), which is
//! used as it is. Modules are decompressed, so that any `insmod` can load them, and put in the order of their
//! dependencies.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::BuildGuestError;
use crate::apt::{Apt, WorkDir, make_dir, rename, write};
use crate::elf::Elf;

/// What guests load, beside the dependencies: drivers of the board's devices.
const MODULES: &[&str] =
    &["virtio_mmio", "virtio_net", "virtio_blk", "virtio_console", "virtio_rng"];
/// The file system's modules with what they load at run time; guests that keep no data go without.
const DISK_MODULES: &[&str] = &["crc32c_generic", "ext4"];
/// The file system of an EFI partition, which the installer of stock systems mounts.
const INSTALL_MODULES: &[&str] = &["vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8"];
/// Raised when what is kept of the package changes.
const LAYOUT: u32 = 4;

/// Kernel files in the cache.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// Package file name without `.deb`.
    pub(crate) stem: String,
    /// The kernel image.
    pub(crate) image: PathBuf,
    /// Modules of devices in the order to load them: file name and path.
    pub(crate) modules: Vec<(String, PathBuf)>,
    /// Modules of the file system, to load after them.
    pub(crate) disk_modules: Vec<(String, PathBuf)>,
    /// Modules for the installer alone, to load after those.
    pub(crate) install_modules: Vec<(String, PathBuf)>,
}

/// The newest kernel of Debian's metapackage, fetched if needed.
pub(crate) fn fetch(apt: &Apt, cache: &Path) -> Result<Kernel, BuildGuestError> {
    let closure = apt.closure(&["linux-image-riscv64"], &[])?;
    let package = closure
        .iter()
        .find(|p| p.name.starts_with("linux-image-") && p.name != "linux-image-riscv64")
        .ok_or(BuildGuestError::NotFound { what: "kernel package".to_owned() })?;
    let home = cache.join("kernels").join(format!("{}.{LAYOUT}", package.stem));
    if !home.exists() {
        let work = WorkDir::new(&cache.join("kernels"))?;
        let tree = apt.unpack_once(package, &work)?;
        let ready = work.path().join("ready");
        make_dir(&ready)?;
        take_image(&tree, &ready)?;
        take_modules(&tree, &ready)?;
        rename(&ready, &home)?;
    }
    Ok(Kernel {
        stem: package.stem.clone(),
        image: home.join("vmlinux"),
        modules: ordered_in(&home, "order")?,
        disk_modules: ordered_in(&home, "order.disk")?,
        install_modules: ordered_in(&home, "order.install")?,
    })
}

fn ordered_in(home: &Path, list: &str) -> Result<Vec<(String, PathBuf)>, BuildGuestError> {
    let path = home.join(list);
    let names =
        fs::read_to_string(&path).map_err(|source| BuildGuestError::Cache { path, source })?;
    Ok(names.lines().map(|name| (name.to_owned(), home.join(name))).collect())
}

fn take_image(tree: &Path, ready: &Path) -> Result<(), BuildGuestError> {
    let boot = tree.join("boot");
    let image = list(&boot)?
        .into_iter()
        .find(|path| file_name(path).starts_with("vmlinu"))
        .ok_or(BuildGuestError::NotFound { what: "kernel image".to_owned() })?;
    let bytes = read(&image)?;
    // The magic number of a RISC-V `Image`, at byte 56 of its header.
    if bytes.get(56..60) != Some(b"RSC\x05") {
        return Err(BuildGuestError::NotFound {
            what: "uncompressed RISC-V kernel image".to_owned(),
        });
    }
    rename(&image, &ready.join("vmlinux"))
}

fn take_modules(tree: &Path, ready: &Path) -> Result<(), BuildGuestError> {
    let mut available = BTreeMap::new();
    for home in ["usr/lib/modules", "lib/modules"] {
        collect_modules(&tree.join(home), 0, &mut available)?;
    }
    let mut seen = Vec::new();
    for (list, names) in
        [("order", MODULES), ("order.disk", DISK_MODULES), ("order.install", INSTALL_MODULES)]
    {
        let mut ordered = Vec::new();
        for name in names {
            add_module(name, &available, ready, &mut seen, &mut ordered)?;
        }
        write(&ready.join(list), &(ordered.join("\n") + "\n"))?;
    }
    Ok(())
}

/// Writes a module and, before it, what it depends on. A name that is no module is built in; that is how the kernel
/// package is divided, and a driver that is really missing shows at boot.
fn add_module(
    name: &str,
    available: &BTreeMap<String, PathBuf>,
    ready: &Path,
    seen: &mut Vec<String>,
    ordered: &mut Vec<String>,
) -> Result<(), BuildGuestError> {
    let name = name.replace('-', "_");
    let Some(path) = available.get(&name) else { return Ok(()) };
    if seen.contains(&name) {
        return Ok(());
    }
    seen.push(name.clone());
    let bytes = decompress(path)?;
    let elf =
        Elf::parse(&bytes).ok_or(BuildGuestError::NotFound { what: format!("module {name}") })?;
    for (key, value) in elf.modinfo() {
        let wanted: Vec<&str> = match key {
            "depends" => value.split(',').collect(),
            "softdep" => {
                value.strip_prefix("pre:").unwrap_or_default().split_whitespace().collect()
            }
            _ => Vec::new(),
        };
        for dependency in wanted {
            add_module(dependency, available, ready, seen, ordered)?;
        }
    }
    let file = format!("{name}.ko");
    let to = ready.join(&file);
    fs::write(&to, &bytes).map_err(|source| BuildGuestError::Cache { path: to, source })?;
    ordered.push(file);
    Ok(())
}

fn collect_modules(
    dir: &Path,
    depth: u32,
    found: &mut BTreeMap<String, PathBuf>,
) -> Result<(), BuildGuestError> {
    if depth > 16 || !dir.is_dir() {
        return Ok(());
    }
    for path in list(dir)? {
        if path.is_dir() {
            collect_modules(&path, depth + 1, found)?;
        } else if let Some((name, _)) = file_name(&path).split_once(".ko") {
            found.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn decompress(path: &Path) -> Result<Vec<u8>, BuildGuestError> {
    let bytes = read(path)?;
    if path.extension().is_none_or(|end| end != "xz") {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut out).map_err(|_| {
        BuildGuestError::NotFound { what: format!("readable module {}", path.display()) }
    })?;
    Ok(out)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, BuildGuestError> {
    let entries = fs::read_dir(dir)
        .map_err(|source| BuildGuestError::Cache { path: dir.to_owned(), source })?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>, BuildGuestError> {
    fs::read(path).map_err(|source| BuildGuestError::Cache { path: path.to_owned(), source })
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
