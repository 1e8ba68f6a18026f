//! Where an NBD export is: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
//!
//! # References
//! doc/uri.md of the NBD project.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

const PORT_DEFAULT: u16 = 10809;
/// Longest name of an export that the protocol allows.
const EXPORT_BYTES_MAX: usize = 4096;

/// Where an export is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUrl {
    pub(super) server: Server,
    pub(super) export: String,
    text: String,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Server {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl FromStr for NbdUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = |why: &str| {
            format!(
                "{text:?} {why}: an export is nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"
            )
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| fail("is no NBD URL"))?;
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, q)| (rest, Some(q)));
        let (place, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).ok_or_else(|| fail("has a malformed export name"))?;
        if export.len() > EXPORT_BYTES_MAX {
            return Err(fail("has too long an export name"));
        }
        let server = match (scheme, query) {
            ("nbd", None) => tcp(place).ok_or_else(|| fail("names no host and port"))?,
            ("nbd+unix", Some(query)) if place.is_empty() => {
                let path = query.strip_prefix("socket=").and_then(decode).filter(|p| !p.is_empty());
                Server::Unix(path.ok_or_else(|| fail("names no socket"))?.into())
            }
            ("nbds" | "nbds+unix", _) => {
                return Err(format!(
                    "{text:?} asks for TLS, which is not supported: use nbd:// over a network that is trusted, or a tunnel"
                ));
            }
            _ => return Err(fail("is no NBD URL that is known")),
        };
        Ok(Self { server, export, text: text.to_owned() })
    }
}

fn tcp(place: &str) -> Option<Server> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
        }
        None => place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Some(PORT_DEFAULT), |port| port.parse().ok())?;
    (!host.is_empty()).then(|| Server::Tcp { host: host.to_owned(), port })
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let value = digit(rest.next())? * 16 + digit(rest.next())?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> (Server, String) {
        let url: NbdUrl = text.parse().unwrap();
        assert_eq!(url.to_string(), text);
        (url.server, url.export)
    }

    fn tcp(host: &str, port: u16) -> Server {
        Server::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn urls_name_server_and_export() {
        assert_eq!(parse("nbd://san"), (tcp("san", 10809), String::new()));
        assert_eq!(parse("nbd://san:7/a/b%20c"), (tcp("san", 7), "a/b c".to_owned()));
        assert_eq!(parse("nbd://[fd00::1]:7/x"), (tcp("fd00::1", 7), "x".to_owned()));
        let unix = Server::Unix("/run/a b".into());
        assert_eq!(parse("nbd+unix:///x?socket=/run/a%20b"), (unix, "x".to_owned()));
        for (wrong, why) in [
            ("san/x", "no NBD URL"),
            ("nbd://:7/x", "host and port"),
            ("nbd://san:x/x", "host and port"),
            ("nbd+unix:///x", "NBD URL that is known"),
            ("nbd+unix:///x?sock=/a", "socket"),
            ("nbd://san/%zz", "export name"),
            ("nbds://san/x", "TLS"),
        ] {
            let said = wrong.parse::<NbdUrl>().unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_url_or_an_error(text in "(nbd|nbd\\+unix)?(://)?[\\PC]{0,40}") {
            drop(text.parse::<NbdUrl>());
        }
    }
}
