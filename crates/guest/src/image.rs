//! Packs programs with the libraries they need, files and kernel modules into a guest's file tree.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use crate::BuildGuestError;
use crate::cpio::FileTree;
use crate::elf::Elf;

/// Where a guest's libraries go: a directory that Debian's dynamic linker searches without a cache.
const LIBRARY_HOME: &str = "usr/lib/riscv64-linux-gnu";
const DEPTH_MAX: u32 = 24;

/// Unpacked packages, looked at as one file system.
#[derive(Debug)]
pub(crate) struct Packages {
    roots: Vec<PathBuf>,
    libraries: BTreeMap<String, PathBuf>,
}

impl Packages {
    /// The packages unpacked in `roots`.
    pub(crate) fn new(roots: Vec<PathBuf>) -> Self {
        let mut libraries = BTreeMap::new();
        for root in &roots {
            for home in ["usr/lib", "lib"] {
                index_libraries(root, &root.join(home), 0, &mut libraries);
            }
        }
        Self { roots, libraries }
    }

    /// Contents of the file that a program in the guest would see at `path`.
    fn read(&self, path: &str) -> Result<Vec<u8>, BuildGuestError> {
        let not_found = || BuildGuestError::NotFound { what: format!("/{path} in the packages") };
        let mut path = PathBuf::from(path);
        for _ in 0..8 {
            let merged = Path::new("usr").join(&path);
            let found =
                self.roots.iter().flat_map(|root| [root.join(&path), root.join(&merged)]).find_map(
                    |full| {
                        let kind = fs::symlink_metadata(&full).ok()?.file_type();
                        Some((full, kind))
                    },
                );
            let (full, kind) = found.ok_or_else(not_found)?;
            if kind.is_file() {
                return fs::read(&full)
                    .map_err(|source| BuildGuestError::Cache { path: full, source });
            }
            let target = fs::read_link(&full).map_err(|_| not_found())?;
            path = resolve(&path, &target);
        }
        Err(not_found())
    }

    /// Adds a program at the same path, and every library that it needs.
    pub(crate) fn add_program(
        &self,
        tree: &mut FileTree,
        path: &str,
    ) -> Result<(), BuildGuestError> {
        self.add_elf(tree, path, path, 0)
    }

    /// Adds a library by its name, and every library that it needs.
    pub(crate) fn add_library(
        &self,
        tree: &mut FileTree,
        name: &str,
    ) -> Result<(), BuildGuestError> {
        self.add_needed(tree, name, 0)
    }

    /// Adds a plain file at the same path.
    pub(crate) fn add_file(&self, tree: &mut FileTree, path: &str) -> Result<(), BuildGuestError> {
        tree.add_file(path, 0o644, self.read(path)?);
        Ok(())
    }

    /// Adds all plain files below `path`, in whichever package they are.
    pub(crate) fn add_dir(&self, tree: &mut FileTree, path: &str) {
        for root in &self.roots {
            add_below(root, &root.join(path), 0, tree);
        }
    }

    /// Adds everything that the packages have, with links, but for paths that start with one of `without`. Top
    /// directories that Debian merged with those below `/usr` go there.
    pub(crate) fn add_all(&self, tree: &mut FileTree, without: &[&str]) {
        for root in &self.roots {
            add_whole(root, root, 0, without, tree);
        }
    }

    /// Contents of a text file.
    pub(crate) fn text(&self, path: &str) -> Result<String, BuildGuestError> {
        let bytes = self.read(path)?;
        String::from_utf8(bytes).map_err(|_| BuildGuestError::NotFound {
            what: format!("text in /{path} in the packages"),
        })
    }

    fn add_elf(
        &self,
        tree: &mut FileTree,
        from: &str,
        to: &str,
        depth: u32,
    ) -> Result<(), BuildGuestError> {
        if tree.contains(to) || depth > DEPTH_MAX {
            return Ok(());
        }
        let bytes = self.read(from)?;
        let elf = Elf::parse(&bytes);
        let needed: Vec<String> = elf.iter().flat_map(Elf::needed).map(str::to_owned).collect();
        let interpreter =
            elf.and_then(|e| e.interpreter()).map(|path| path.trim_start_matches('/').to_owned());
        tree.add_file(to, 0o755, bytes);
        if let Some(path) = interpreter {
            // The guest's `lib` is a link to `usr/lib`, as on Debian.
            self.add_elf(
                tree,
                &path,
                &format!("usr/{}", path.trim_start_matches("usr/")),
                depth + 1,
            )?;
        }
        needed.iter().try_for_each(|name| self.add_needed(tree, name, depth + 1))
    }

    fn add_needed(
        &self,
        tree: &mut FileTree,
        name: &str,
        depth: u32,
    ) -> Result<(), BuildGuestError> {
        let from = self.libraries.get(name).and_then(|path| path.to_str()).ok_or_else(|| {
            BuildGuestError::NotFound { what: format!("library {name} in the packages") }
        })?;
        // The dynamic linker has its place by its path; programs name it as a library too.
        let home = if name.starts_with("ld-linux") { "usr/lib" } else { LIBRARY_HOME };
        self.add_elf(tree, from, &format!("{home}/{name}"), depth)
    }
}

fn resolve(link: &Path, target: &Path) -> PathBuf {
    let mut path = if target.is_absolute() {
        PathBuf::new()
    } else {
        link.parent().map(Path::to_owned).unwrap_or_default()
    };
    for part in target.components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    path
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let Ok(found) = fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = found.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

fn index_libraries(root: &Path, dir: &Path, depth: u32, found: &mut BTreeMap<String, PathBuf>) {
    for path in entries(dir) {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        if path.is_dir() && !path.is_symlink() {
            if depth < 3 {
                index_libraries(root, &path, depth + 1, found);
            }
        } else if name.contains(".so")
            && let Ok(inside) = path.strip_prefix(root)
        {
            found.entry(name.to_owned()).or_insert_with(|| inside.to_owned());
        }
    }
}

fn add_below(root: &Path, dir: &Path, depth: u32, tree: &mut FileTree) {
    for path in entries(dir) {
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            if depth < DEPTH_MAX {
                add_below(root, &path, depth + 1, tree);
            }
        } else if let Ok(inside) = path.strip_prefix(root)
            && let Some(inside) = inside.to_str()
            && let Ok(bytes) = fs::read(&path)
        {
            tree.add_file(inside, 0o644, bytes);
        }
    }
}

fn add_whole(root: &Path, dir: &Path, depth: u32, without: &[&str], tree: &mut FileTree) {
    for path in entries(dir) {
        let Some(inside) = path.strip_prefix(root).ok().and_then(Path::to_str) else { continue };
        let merged = ["bin/", "lib/", "sbin/"].iter().any(|top| inside.starts_with(top));
        let to = if merged { format!("usr/{inside}") } else { inside.to_owned() };
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        if without.iter().any(|start| format!("{to}/").starts_with(start)) {
            continue;
        }
        if data.is_dir() {
            let is_merged = ["bin", "lib", "sbin"].contains(&to.as_str());
            if !is_merged {
                tree.add_dir(&to);
            }
            if depth < DEPTH_MAX {
                add_whole(root, &path, depth + 1, without, tree);
            }
        } else if data.is_symlink() {
            if let Ok(target) = fs::read_link(&path)
                && let Some(target) = target.to_str()
                && !tree.contains(&to)
            {
                tree.add_symlink(&to, target);
            }
        } else if let Ok(bytes) = fs::read(&path) {
            tree.add_file(&to, data.permissions().mode() & 0o777, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_resolve_inside_the_packages() {
        let at = |link: &str, to: &str| resolve(Path::new(link), Path::new(to));
        assert_eq!(at("usr/lib/a.so", "b.so.1"), Path::new("usr/lib/b.so.1"));
        assert_eq!(at("usr/lib/a.so", "../../../etc/x"), Path::new("etc/x"));
        assert_eq!(at("usr/bin/a", "/etc/alternatives/a"), Path::new("etc/alternatives/a"));
    }

    #[test]
    fn missing_library_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let packages = Packages::new(vec![dir.path().to_owned()]);
        let error = packages.add_library(&mut FileTree::new(), "libx.so.1").unwrap_err();
        assert_eq!(error.to_string(), "library libx.so.1 in the packages not found");
    }
}
