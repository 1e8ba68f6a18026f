//! What is said on an NBD connection: the negotiation, requests, and replies, simple and structured.
//!
//! # Invariants
//! - INV-NBD-1: nothing that a server sends makes this allocate more than its request asked for, or [`OPTION_BYTES_MAX`].
//! - A reply that does not fit its request ends the connection: what follows could be anything.
//!
//! # References
//! doc/proto.md of the NBD project: fixed newstyle negotiation.

use std::io::{self, Read, Write};

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED: u32 = 8;
const OPTION_SET_CONTEXT: u32 = 10;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_CONTEXT: u32 = 4;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// Longest reply to an option that is read.
const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Most replies to one option.
const OPTION_REPLIES_MAX: u32 = 64;

/// Longest request with data; servers that say nothing else take it.
pub(super) const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
const BLOCK_BYTES_MAX: u32 = 64 << 10;
/// Longest message of an error that is read.
const ERROR_BYTES_MAX: u32 = 4096 + 14;
/// Most extents in one answer.
const EXTENTS_MAX: u32 = 16 << 10;

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISCONNECT: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

pub(super) const CAN_READ_ONLY: u16 = 1 << 1;
pub(super) const CAN_FLUSH: u16 = 1 << 2;
pub(super) const CAN_WRITE_ZEROES: u16 = 1 << 6;

/// Why a server cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// Not the protocol.
    #[error("the server does not keep to the NBD protocol: {0}")]
    Nonsense(&'static str),
    /// It wants TLS.
    #[error(
        "the server requires TLS, which is not supported: let it listen without, on a network that is trusted"
    )]
    Tls,
    /// It does not have the export.
    #[error("the server has no export {0:?}")]
    NoExport(String),
    /// It refuses.
    #[error("the server refuses the export: {0}")]
    Refused(String),
    /// The export cannot be used.
    #[error("{0}")]
    Unfit(String),
}

fn nonsense<T>(what: &'static str) -> Result<T, NbdError> {
    Err(NbdError::Nonsense(what))
}

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) size: u64,
    pub(super) flags: u16,
    /// Offsets and lengths are multiples of this.
    pub(super) block: u32,
    /// Longest data of a request; a multiple of `block`.
    pub(super) payload_max: u32,
    pub(super) is_structured: bool,
    /// Number of the context that tells holes, if there is one.
    pub(super) context: Option<u32>,
}

impl Export {
    pub(super) fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

fn bytes<const N: usize>(from: &mut impl Read) -> Result<[u8; N], NbdError> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn be16(from: &mut impl Read) -> Result<u16, NbdError> {
    Ok(u16::from_be_bytes(bytes(from)?))
}

fn be32(from: &mut impl Read) -> Result<u32, NbdError> {
    Ok(u32::from_be_bytes(bytes(from)?))
}

fn be64(from: &mut impl Read) -> Result<u64, NbdError> {
    Ok(u64::from_be_bytes(bytes(from)?))
}

/// Agrees with the server on the use of an export.
pub(super) fn negotiate(stream: &mut (impl Read + Write), name: &str) -> Result<Export, NbdError> {
    if be64(stream)? != INIT_MAGIC {
        return nonsense("it does not greet");
    }
    if be64(stream)? != OPTION_MAGIC {
        return nonsense("it knows the old style only");
    }
    let server = be16(stream)?;
    if server & 1 == 0 {
        return nonsense("it does not know the fixed newstyle");
    }
    // Fixed newstyle, and without the padding of old, where the server has that.
    stream.write_all(&u32::from(server & 3).to_be_bytes())?;
    let is_structured = send_option(stream, OPTION_STRUCTURED, &[], &mut |_, _| Ok(()))
        .map(|answer| answer == Answer::Agreed)?;
    let mut context = None;
    if is_structured {
        let query = b"base:allocation";
        let mut data = named(name);
        data.extend(1u32.to_be_bytes());
        data.extend(15u32.to_be_bytes());
        data.extend(query);
        let mut found = None;
        let answer = send_option(stream, OPTION_SET_CONTEXT, &data, &mut |kind, mut reply| {
            if kind == REPLY_CONTEXT {
                let id = be32(&mut reply)?;
                if reply == query {
                    found = Some(id);
                }
            }
            Ok(())
        })?;
        context = found.filter(|_| answer == Answer::Agreed);
    }
    let mut export = go(stream, name)?;
    (export.is_structured, export.context) = (is_structured, context);
    Ok(export)
}

fn named(name: &str) -> Vec<u8> {
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes(), name.as_bytes()].concat()
}

fn go(stream: &mut (impl Read + Write), name: &str) -> Result<Export, NbdError> {
    let mut data = named(name);
    data.extend(1u16.to_be_bytes());
    data.extend(INFO_BLOCK_SIZE.to_be_bytes());
    let mut about = None;
    let mut blocks = None;
    let answer = send_option(stream, OPTION_GO, &data, &mut |kind, mut reply| {
        if kind == REPLY_INFO {
            match be16(&mut reply)? {
                INFO_EXPORT => about = Some((be64(&mut reply)?, be16(&mut reply)?)),
                INFO_BLOCK_SIZE => {
                    let (min, _, max) = (be32(&mut reply)?, be32(&mut reply)?, be32(&mut reply)?);
                    blocks = Some((min, max));
                }
                _ => {}
            }
        }
        Ok(())
    })?;
    match answer {
        Answer::Agreed => {}
        Answer::Unknown => return Err(NbdError::NoExport(name.to_owned())),
        Answer::NotSupported => return nonsense("it does not know NBD_OPT_GO"),
        Answer::Refused(why) => return Err(NbdError::Refused(why)),
    }
    let Some((size, flags)) = about else { return nonsense("it does not describe the export") };
    let (block, max) = blocks.unwrap_or((512, PAYLOAD_BYTES_MAX));
    if !block.is_power_of_two() || block > BLOCK_BYTES_MAX || max < block {
        return nonsense("its block sizes are impossible");
    }
    let payload_max = max.min(PAYLOAD_BYTES_MAX) / block * block;
    Ok(Export { size, flags, block, payload_max, is_structured: false, context: None })
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Agreed,
    NotSupported,
    Unknown,
    Refused(String),
}

/// Is given the kind and the data of a reply to an option.
type TakeReply<'a> = dyn FnMut(u32, &[u8]) -> Result<(), NbdError> + 'a;

/// Sends an option, gives each reply to `take` until the last one, and says what that was.
fn send_option(
    stream: &mut (impl Read + Write),
    option: u32,
    data: &[u8],
    take: &mut TakeReply<'_>,
) -> Result<Answer, NbdError> {
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(option.to_be_bytes());
    message.extend(len.to_be_bytes());
    message.extend(data);
    stream.write_all(&message)?;
    for _ in 0..OPTION_REPLIES_MAX {
        if be64(stream)? != OPTION_REPLY_MAGIC || be32(stream)? != option {
            return nonsense("it answers what was not asked");
        }
        let (kind, len) = (be32(stream)?, be32(stream)?);
        if len > OPTION_BYTES_MAX {
            return nonsense("an answer is too long");
        }
        let mut reply = vec![0; len as usize];
        stream.read_exact(&mut reply)?;
        let text = || {
            let text: String = String::from_utf8_lossy(&reply).chars().take(200).collect();
            let text = text.replace(|c: char| c.is_control(), " ");
            if text.is_empty() { format!("error {:#x}", kind) } else { text }
        };
        match kind {
            REPLY_ACK => return Ok(Answer::Agreed),
            0x8000_0001 => return Ok(Answer::NotSupported),
            0x8000_0005 => return Err(NbdError::Tls),
            0x8000_0006 => return Ok(Answer::Unknown),
            0x8000_0000.. => return Ok(Answer::Refused(text())),
            _ => match take(kind, &reply) {
                // The reply was read whole; what is missing, the server left out.
                Err(NbdError::Io(_)) => return nonsense("an answer is too short"),
                taken => taken?,
            },
        }
    }
    nonsense("it does not come to an end")
}

/// The head of a request.
pub(super) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut head = [0; 28];
    head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[6..8].copy_from_slice(&command.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..].copy_from_slice(&len.to_be_bytes());
    head
}

/// The head of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Simple { error: u32, cookie: u64 },
    Chunk { is_last: bool, kind: u16, cookie: u64, len: u32 },
}

impl Head {
    pub(super) fn read(from: &mut impl Read) -> Result<Self, NbdError> {
        match be32(from)? {
            SIMPLE_MAGIC => Ok(Self::Simple { error: be32(from)?, cookie: be64(from)? }),
            STRUCTURED_MAGIC => {
                let (flags, kind) = (be16(from)?, be16(from)?);
                let (cookie, len) = (be64(from)?, be32(from)?);
                Ok(Self::Chunk { is_last: flags & 1 != 0, kind, cookie, len })
            }
            _ => nonsense("what should be a reply is none"),
        }
    }

    pub(super) fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }
}

/// An extent: length, and whether it reads as zeroes.
pub(super) type Extent = (u32, bool);

/// What a request gets, piece by piece.
#[derive(Debug)]
pub(super) struct Reply {
    command: u16,
    offset: u64,
    /// The data of a read, all of it from the start.
    pub(super) data: Vec<u8>,
    /// How much of it has come.
    come: u64,
    pub(super) extents: Vec<Extent>,
    context: Option<u32>,
    /// The first error that the server told.
    pub(super) error: Option<u32>,
}

impl Reply {
    pub(super) fn to(command: u16, offset: u64, len: u32, context: Option<u32>) -> Self {
        let data = vec![0; if command == READ { len as usize } else { 0 }];
        Self { command, offset, data, come: 0, extents: Vec::new(), context, error: None }
    }

    /// Takes the rest of what has this head. True: that was the last of it.
    pub(super) fn take(&mut self, head: Head, from: &mut impl Read) -> Result<bool, NbdError> {
        match head {
            Head::Simple { error: 0, .. } => {
                if self.command == BLOCK_STATUS || self.come > 0 {
                    return nonsense("a simple reply to what has none");
                }
                from.read_exact(&mut self.data)?;
                Ok(true)
            }
            Head::Simple { error, .. } => {
                self.error.get_or_insert(error);
                Ok(true)
            }
            Head::Chunk { is_last, kind, len, .. } => {
                self.take_chunk(kind, len, from)?;
                let is_whole = self.command != READ || self.come == self.data.len() as u64;
                if is_last && self.error.is_none() && !is_whole {
                    return nonsense("a read that is not whole");
                }
                Ok(is_last)
            }
        }
    }

    fn take_chunk(&mut self, kind: u16, len: u32, from: &mut impl Read) -> Result<(), NbdError> {
        match (kind, len) {
            (0, 0) => Ok(()),
            (1, 9..) if self.command == READ => {
                let at = be64(from)?;
                let place = self.place(at, u64::from(len - 8))?;
                from.read_exact(&mut self.data[place])?;
                Ok(())
            }
            (2, 12) if self.command == READ => {
                let at = be64(from)?;
                let hole = u64::from(be32(from)?);
                let place = self.place(at, hole)?;
                self.data[place].fill(0);
                Ok(())
            }
            (5, 12..) if self.command == BLOCK_STATUS => self.take_extents(len, from),
            (0x8000.., 6..=ERROR_BYTES_MAX) => {
                let error = be32(from)?;
                let mut rest = vec![0; len as usize - 4];
                from.read_exact(&mut rest)?;
                // EIO for a server that does not know what it wants to say.
                self.error.get_or_insert(if error == 0 { 5 } else { error });
                Ok(())
            }
            _ => nonsense("a piece of a reply that does not fit its request"),
        }
    }

    /// Where a piece of a read belongs.
    fn place(&mut self, at: u64, len: u64) -> Result<std::ops::Range<usize>, NbdError> {
        let size = self.data.len() as u64;
        let start = at.checked_sub(self.offset);
        let end = start.and_then(|start| start.checked_add(len)).filter(|end| *end <= size);
        match (start, end) {
            (Some(start), Some(end)) if len > 0 && self.come + len <= size => {
                self.come += len;
                // Both are at most the buffer's length.
                Ok(start as usize..end as usize)
            }
            _ => nonsense("a read of what was not asked for"),
        }
    }

    fn take_extents(&mut self, len: u32, from: &mut impl Read) -> Result<(), NbdError> {
        let count = (len - 4) / 8;
        if count > EXTENTS_MAX || !(len - 4).is_multiple_of(8) || !self.extents.is_empty() {
            return nonsense("a list of extents that cannot be");
        }
        let context = be32(from)?;
        for _ in 0..count {
            let (len, flags) = (be32(from)?, be32(from)?);
            self.extents.push((len, flags & 2 != 0));
        }
        if Some(context) != self.context {
            return nonsense("extents of another context");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A stream that reads what is given and swallows what is written.
    struct Canned<'a>(&'a [u8]);

    impl Read for Canned<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }

    impl Write for Canned<'_> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn greeting() -> Vec<u8> {
        [&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &3u16.to_be_bytes()].concat()
    }

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let len = data.len() as u32;
        let head = [option.to_be_bytes(), kind.to_be_bytes(), len.to_be_bytes()].concat();
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &head, data].concat()
    }

    fn about(size: u64) -> Vec<u8> {
        [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &5u16.to_be_bytes()].concat()
    }

    fn agreed(parts: &[Vec<u8>]) -> Result<Export, NbdError> {
        negotiate(&mut Canned(&[greeting(), parts.concat()].concat()), "x")
    }

    #[test]
    fn an_export_is_agreed_on() {
        let blocks = [0x0003_0000_0200u64.to_be_bytes(), 0x1000_0001_0001u64.to_be_bytes()];
        let blocks =
            [&blocks[0][2..], &0x1000u32.to_be_bytes(), &0x1_0001u32.to_be_bytes()].concat();
        let simple = reply(OPTION_STRUCTURED, 0x8000_0001, b"");
        let export = agreed(&[
            simple.clone(),
            reply(OPTION_GO, REPLY_INFO, &about(1 << 20)),
            reply(OPTION_GO, REPLY_INFO, &blocks),
            reply(OPTION_GO, REPLY_ACK, b""),
        ])
        .unwrap();
        assert_eq!((export.size, export.block, export.payload_max), (1 << 20, 512, 0x1_0000));
        assert!(export.can(CAN_FLUSH) && !export.can(CAN_READ_ONLY) && !export.is_structured);
        let fails = |last: Vec<u8>, why: &str| {
            let said = agreed(&[simple.clone(), last]).unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
        };
        fails(reply(OPTION_GO, 0x8000_0005, b""), "TLS");
        fails(reply(OPTION_GO, 0x8000_0006, b""), "no export \"x\"");
        fails(reply(OPTION_GO, 0x8000_0002, b"not\nyou"), "not you");
        fails(reply(OPTION_GO, REPLY_ACK, b""), "describe");
        fails(reply(OPTION_GO, REPLY_INFO, b"\0"), "too short");
        fails(reply(OPTION_STRUCTURED, REPLY_ACK, b""), "not asked");
        fails(reply(OPTION_GO, REPLY_INFO, &about(1)).repeat(70), "end");
    }

    fn chunk(is_last: bool, kind: u16, data: &[u8]) -> Vec<u8> {
        let head = [u16::from(is_last).to_be_bytes(), kind.to_be_bytes()].concat();
        let len = (data.len() as u32).to_be_bytes();
        [&STRUCTURED_MAGIC.to_be_bytes()[..], &head, &[0; 8], &len, data].concat()
    }

    fn replies(reply: &mut Reply, mut bytes: &[u8]) -> Result<(), NbdError> {
        loop {
            let head = Head::read(&mut bytes)?;
            if reply.take(head, &mut bytes)? {
                return Ok(());
            }
        }
    }

    #[test]
    fn a_read_is_put_together_from_pieces() {
        let data = |at: u64, bytes: &[u8]| [&at.to_be_bytes()[..], bytes].concat();
        let hole = |at: u64, len: u32| [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
        let mut read = Reply::to(READ, 100, 8, None);
        let pieces = [chunk(false, 1, &data(104, b"abcd")), chunk(true, 2, &hole(100, 4))];
        replies(&mut read, &pieces.concat()).unwrap();
        assert_eq!(read.data, b"\0\0\0\0abcd");
        for wrong in [
            chunk(true, 1, &data(104, b"abcd")),
            chunk(true, 1, &data(99, b"abcdefgh")),
            chunk(true, 1, &data(104, b"abcdefgh")),
            chunk(true, 2, &hole(u64::MAX, 4)),
            chunk(true, 2, &hole(100, u32::MAX)),
            chunk(true, 5, &[0; 12]),
        ] {
            let mut read = Reply::to(READ, 100, 8, None);
            assert!(matches!(replies(&mut read, &wrong), Err(NbdError::Nonsense(_))));
        }
        let mut failed = Reply::to(READ, 100, 8, None);
        replies(&mut failed, &chunk(true, 0x8001, &[0, 0, 0, 28, 0, 0])).unwrap();
        assert_eq!(failed.error, Some(28));
    }

    proptest! {
        #[test]
        fn any_bytes_are_replies_or_an_error(
            command in prop::sample::select(vec![READ, WRITE, FLUSH, BLOCK_STATUS]),
            len in 1u32..5000,
            pieces in prop::collection::vec((any::<bool>(), prop::sample::select(vec![0u16, 1, 2, 5, 0x8001, 9]), prop::collection::vec(any::<u8>(), 0..40)), 0..5),
            rest in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut bytes: Vec<u8> = pieces.iter().flat_map(|(last, kind, data)| chunk(*last, *kind, data)).collect();
            bytes.extend(&rest);
            let mut reply = Reply::to(command, 0, len, Some(0));
            drop(replies(&mut reply, &bytes));
            prop_assert!(reply.data.len() <= len as usize && reply.extents.len() <= EXTENTS_MAX as usize);
            drop(replies(&mut Reply::to(command, 0, len, None), &rest));
        }

        #[test]
        fn any_bytes_are_a_negotiation_or_an_error(
            parts in prop::collection::vec((prop::sample::select(vec![7u32, 8, 10]), prop::sample::select(vec![1u32, 3, 4, 0x8000_0001, 0x8000_0009]), prop::collection::vec(any::<u8>(), 0..24)), 0..6),
            rest in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let parts: Vec<u8> = parts.iter().flat_map(|(o, k, d)| reply(*o, *k, d)).collect();
            drop(negotiate(&mut Canned(&[greeting(), parts, rest.clone()].concat()), "x"));
            drop(negotiate(&mut Canned(&rest), "x"));
        }
    }
}
