//! Golden vector, damage and properties of segments.

use proptest::prelude::*;

use super::*;

fn header() -> SegmentHeader {
    let mut identity = [0; 32];
    for (i, b) in identity.iter_mut().enumerate() {
        *b = i as u8;
    }
    SegmentHeader {
        identity,
        start: LogPos { lsn: 2, icount: 300 },
        clock: ClockBase { mtime: 4, at: 5, rate: 6 },
    }
}

fn sample() -> Vec<u8> {
    let mut out = vec![];
    let mut writer = SegmentWriter::new(header(), &mut out);
    writer.frame(b"abc", &mut out);
    writer.frame(b"de", &mut out);
    writer.finish(LogPos { lsn: 7, icount: 900 }, &mut out);
    writer.finish(LogPos { lsn: 8, icount: 900 }, &mut out);
    out
}

fn read(bytes: &[u8]) -> (Vec<u8>, Result<SegmentEnd, SegmentError>) {
    let mut reader = SegmentReader::new();
    reader.push(bytes);
    let mut got = vec![];
    loop {
        match reader.next() {
            Ok(Some(payload)) => got.extend(payload),
            Ok(None) => return (got, Ok(reader.finish())),
            Err(error) => {
                assert_eq!(reader.next(), Err(error));
                return (got, Err(error));
            }
        }
    }
}

#[test]
fn golden_bytes_have_not_changed() {
    let hex: String = sample().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, GOLDEN);
    let (payload, end) = read(&sample());
    assert_eq!(payload, b"abcde");
    assert_eq!(end, Ok(SegmentEnd::Clean { end: LogPos { lsn: 7, icount: 900 } }));
}

const GOLDEN: &str = concat!(
    "554e4445524c4f4702000000000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
    "02000000000000002c01000000000000040000000000000005000000000000000600000051d5d45d03000000",
    "f883145561626302000000ed1f871664650000000077fb20c407000000000000008403000000000000",
);

#[test]
fn every_truncation_says_how_far_it_is_good() {
    let bytes = sample();
    for len in 0..bytes.len() {
        let (payload, end) = read(&bytes[..len]);
        let (want, offset) = match len {
            0..84 => (&b""[..], 0),
            84..95 => (&b""[..], 84),
            95..105 => (&b"abc"[..], 95),
            _ => (&b"abcde"[..], 105),
        };
        assert_eq!(payload, want, "cut at {len}");
        assert_eq!(end, Ok(SegmentEnd::Truncated { offset }), "cut at {len}");
    }
}

#[test]
fn every_flipped_bit_is_seen_at_its_frame() {
    let bytes = sample();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let (payload, end) = read(&bad);
        assert!(b"abcde".starts_with(&payload[..]));
        match end {
            Ok(SegmentEnd::Clean { .. }) => panic!("flipped bit {bit} unseen"),
            Ok(SegmentEnd::Truncated { offset }) | Err(SegmentError::Corrupt { offset }) => {
                assert!(offset as usize <= bit / 8);
            }
            Err(SegmentError::NotASegment | SegmentError::Version { .. }) => assert!(bit < 12 * 8),
        }
    }
}

#[test]
fn bytes_after_the_end_are_corruption() {
    let mut bytes = sample();
    let len = bytes.len() as u64;
    bytes.push(0);
    assert_eq!(read(&bytes).1, Err(SegmentError::Corrupt { offset: len }));
}

#[test]
fn long_payload_is_split_into_frames() {
    let mut out = vec![];
    let mut writer = SegmentWriter::new(header(), &mut out);
    let payload = vec![3; MAX_FRAME + 5];
    writer.frame(&payload, &mut out);
    let mut reader = SegmentReader::new();
    reader.push(&out);
    assert_eq!(reader.next().unwrap().unwrap().len(), MAX_FRAME);
    assert_eq!(reader.next().unwrap().unwrap().len(), 5);
    assert_eq!(reader.header(), Some(&header()));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), with_header: bool) {
        let mut all = vec![];
        if with_header {
            let _writer = SegmentWriter::new(header(), &mut all);
        }
        all.extend(bytes);
        let mut reader = SegmentReader::new();
        for part in all.chunks(11) {
            reader.push(part);
            prop_assert!(reader.buf.len() <= all.len());
            while let Ok(Some(_)) = reader.next() {}
        }
    }
}
