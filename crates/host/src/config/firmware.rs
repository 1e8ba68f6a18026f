//! Which firmware boots a VM that has a disk and no kernel: OpenSBI, then U-Boot, from Debian's packages on this host.
//!
//! # Place
//! Asked by [`super::VmConfig::boot_images`] on the host that starts the VM. The other hosts get what was read there with
//! the VM's memory, so that they need no package.
//!
//! # Failure
//! A missing file is one line that names the package to install.

use std::path::{Path, PathBuf};

/// OpenSBI that learns from the board where to go on; of Debian's `opensbi`, and the copy that QEMU brings.
const OPENSBI: [&str; 2] = [
    "/usr/lib/riscv64-linux-gnu/opensbi/generic/fw_dynamic.bin",
    "/usr/share/qemu/opensbi-riscv64-generic-fw_dynamic.bin",
];
/// U-Boot for S-mode; of Debian's `u-boot-qemu`.
const U_BOOT: [&str; 2] = [
    "/usr/lib/u-boot/qemu-riscv64_smode/uboot.elf",
    "/usr/lib/u-boot/qemu-riscv64_smode/u-boot.bin",
];

/// What runs in M-mode, and what it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Firmware {
    pub(super) bios: PathBuf,
    pub(super) u_boot: PathBuf,
}

/// The firmware of this host, but for what the operator named.
pub(super) fn find(bios: Option<&Path>, u_boot: Option<&Path>) -> Result<Firmware, String> {
    Ok(Firmware {
        bios: first_of(bios, &OPENSBI, "OpenSBI", "opensbi", "bios")?,
        u_boot: first_of(u_boot, &U_BOOT, "U-Boot", "u-boot-qemu", "u_boot")?,
    })
}

fn first_of(
    named: Option<&Path>,
    places: &[&str],
    what: &str,
    package: &str,
    key: &str,
) -> Result<PathBuf, String> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    let found = places.iter().map(PathBuf::from).find(|path| path.is_file());
    found.ok_or_else(|| {
        format!(
            "to boot from a disk {what} is needed, and there is none at {}: install Debian's package {package}, or name a \
             file ({key})",
            places[0]
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_files_are_taken_and_missing_ones_name_the_package() {
        let (a, b) = (Path::new("/a"), Path::new("/b"));
        let found = find(Some(a), Some(b)).unwrap();
        assert_eq!((found.bios.as_path(), found.u_boot.as_path()), (a, b));
        let error = first_of(None, &["/nowhere/u"], "U-Boot", "u-boot-qemu", "u_boot").unwrap_err();
        assert!(error.contains("at /nowhere/u: install Debian's package u-boot-qemu"), "{error}");
    }
}
