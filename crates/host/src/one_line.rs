//! An error and its causes as one line of text, for status lines and answers over the control socket.

use std::error::Error;

/// The error's message and those of its causes, joined by `: `, without line breaks.
#[must_use]
pub fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        line.push_str(": ");
        line.push_str(&e.to_string());
        cause = e.source();
    }
    flatten(&line)
}

/// The text without line breaks and without space at its ends.
#[must_use]
pub fn flatten(text: &str) -> String {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start\nthe VM")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_follow_on_the_same_line() {
        let e = Outer(std::io::Error::other("no such disk"));
        assert_eq!(one_line(&e), "cannot start; the VM: no such disk");
    }
}
