//! Names of VMs and hosts: safe as a part of a file name, of a key and of a line of text.

/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// A name that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {name:?} is not usable: 1 to 63 letters, digits, '-', '_' or '.', starting with a letter or digit"
)]
pub struct NameError {
    /// The name as it was given.
    pub name: String,
}

/// Checks a name: 1 to [`NAME_BYTES_MAX`] ASCII letters, digits, `-`, `_`, `.`; the first a letter or digit.
///
/// # Errors
/// The name is not of that form.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if first && rest && name.len() <= NAME_BYTES_MAX {
        Ok(())
    } else {
        Err(NameError { name: name.chars().take(80).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for ok in ["a", "vm-1", "web.example", "0_x"] {
            assert_eq!(check_name(ok), Ok(()));
        }
        for bad in ["", ".", "..", "-a", ".a", "a/b", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
