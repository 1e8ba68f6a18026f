//! Golden vectors and properties of the record encoding.

use machine::io::{BlkStatus, Input};
use proptest::prelude::*;

use super::*;

fn golden() -> Vec<Record> {
    let rec = |icount, entry| Record { icount, entry };
    vec![
        rec(5, Entry::Input(Input::Clock { mtime: 1000, rate: 6554 })),
        rec(65541, Entry::Input(Input::Clock { mtime: 1000 + 6554 - 2, rate: 6554 })),
        rec(65541, Entry::Mark),
        rec(65700, Entry::Digest(0x1122_3344_5566_7788)),
        rec(65700, Entry::Input(Input::NetRx { dev: 1, packet: vec![0xaa, 0xbb] })),
        rec(65701, Entry::BlkReadLocal { dev: 0, id: 300 }),
        rec(
            65701,
            Entry::Input(Input::BlkDone { dev: 15, id: 1, status: BlkStatus::IoErr, data: vec![] }),
        ),
        rec(
            65702,
            Entry::Input(Input::BlkDone { dev: 2, id: 9, status: BlkStatus::Ok, data: vec![7] }),
        ),
        rec(65703, Entry::Input(Input::Console { dev: 0, bytes: b"hi".to_vec() })),
        rec(65703, Entry::Input(Input::Entropy { dev: 0, bytes: vec![1] })),
        rec(65704, Entry::Input(Input::PowerOff)),
        rec(65705, Entry::Input(Input::DiskResized { dev: 1, size: 1 << 30 })),
    ]
}

const GOLDEN: &[u8] = &[
    3, 5, 0xd0, 0x0f, 0x9a, 0x33, // clock with a new rate
    2, 0x80, 0x80, 4, 3, // clock, two ticks behind the derived value
    0, 0, // mark
    1, 0x9f, 1, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // digest
    0x14, 0, 2, 0xaa, 0xbb, // packet for device 1
    7, 1, 0xac, 2, // local read
    0xf6, 15, 0, 1, 1, // completion of device 15
    0x25, 1, 9, 0, 1, 7, // completion with data
    8, 1, 2, b'h', b'i', // console
    9, 0, 1, 1, // entropy
    10, 1, // power off
    0x1b, 1, 0x80, 0x80, 0x80, 0x80, 4, // disk resized
];

fn encode(records: &[Record]) -> Vec<u8> {
    let mut encoder = Encoder::new(LogPos::default(), ClockBase::default());
    let mut out = vec![];
    for r in records {
        encoder.append(r, &mut out).unwrap();
    }
    out
}

#[test]
fn golden_bytes_have_not_changed() {
    assert_eq!(encode(&golden()), GOLDEN);
    let mut decoder = Decoder::new(LogPos::default(), ClockBase::default());
    decoder.push(GOLDEN);
    for want in golden() {
        assert_eq!(decoder.next().unwrap(), Some(want));
    }
    assert_eq!(decoder.next(), Ok(None));
    assert_eq!(decoder.position(), LogPos { lsn: 12, icount: 65705 });
}

#[test]
fn record_before_the_end_is_refused() {
    let mut encoder = Encoder::new(LogPos { lsn: 1, icount: 10 }, ClockBase::default());
    let mut out = vec![];
    let early = Record { icount: 9, entry: Entry::Mark };
    assert!(matches!(
        encoder.append(&early, &mut out),
        Err(AppendError::IcountDecreased { icount: 9, .. })
    ));
    let long = Input::NetRx { dev: 0, packet: vec![0; DATA_MAX + 1] };
    let long = Record { icount: 10, entry: Entry::Input(long) };
    assert!(matches!(encoder.append(&long, &mut out), Err(AppendError::TooLong { .. })));
    assert!(out.is_empty());
}

#[test]
fn longest_read_of_a_disk_fits_a_record() {
    let data = vec![7; machine::io::BLK_READ_MAX];
    let input = Input::BlkDone { dev: 0, id: 1, status: BlkStatus::Ok, data };
    let mut encoder = Encoder::new(LogPos::default(), ClockBase::default());
    let mut out = vec![];
    encoder.append_input(5, &input, &mut out).unwrap();
    let mut decoder = Decoder::new(LogPos::default(), ClockBase::default());
    decoder.push(&out);
    assert_eq!(decoder.next(), Ok(Some(Record { icount: 5, entry: Entry::Input(input) })));
}

#[test]
fn decoder_stays_failed_and_forgets_its_bytes() {
    let mut decoder = Decoder::new(LogPos::default(), ClockBase::default());
    decoder.push(&[12, 0]);
    let error = decoder.next().unwrap_err();
    decoder.push(&[0, 0]);
    assert_eq!(decoder.next(), Err(error));
    assert_eq!(decoder.bytes_pending(), 0);
}

#[test]
fn long_forms_and_overflow_are_refused() {
    for bytes in [
        &[0u8, 0x80, 0][..],
        &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
        &[0xf4, 3, 0, 0],
        &[3, 0, 0, 0],
        &[0x10, 0],
    ] {
        let mut decoder = Decoder::new(LogPos::default(), ClockBase::default());
        decoder.push(bytes);
        assert!(decoder.next().is_err(), "{bytes:?}");
    }
    let mut decoder = Decoder::new(LogPos { lsn: 0, icount: u64::MAX }, ClockBase::default());
    decoder.push(&[0, 1]);
    assert!(matches!(decoder.next(), Err(DecodeError::BadNumber { .. })));
}

#[test]
fn idle_guest_stays_below_fifty_kilobit_a_second() {
    // 100 wake-ups a second, each with a clock input and a mark, at 2000 MIPS when awake.
    let mut encoder = Encoder::new(LogPos::default(), ClockBase::default());
    let mut out = vec![];
    for i in 1..=100u64 {
        let icount = i * 150_000;
        let clock = Input::Clock { mtime: i * 100_000 + i % 7, rate: 328 };
        encoder.append(&Record { icount, entry: Entry::Input(clock) }, &mut out).unwrap();
        encoder.append(&Record { icount: icount + 90_000, entry: Entry::Mark }, &mut out).unwrap();
    }
    assert!(out.len() * 8 < 12_000, "{} bit", out.len() * 8);
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..40)
}

fn entry() -> impl Strategy<Value = Entry> {
    let status =
        prop_oneof![Just(BlkStatus::Ok), Just(BlkStatus::IoErr), Just(BlkStatus::Unsupported)];
    prop_oneof![
        Just(Entry::Mark),
        any::<u64>().prop_map(Entry::Digest),
        (any::<u8>(), any::<u64>()).prop_map(|(dev, id)| Entry::BlkReadLocal { dev, id }),
        (any::<u64>(), prop_oneof![Just(7u32), any::<u32>()])
            .prop_map(|(mtime, rate)| Entry::Input(Input::Clock { mtime, rate })),
        (any::<u8>(), bytes()).prop_map(|(dev, packet)| Entry::Input(Input::NetRx { dev, packet })),
        (any::<u8>(), any::<u64>(), status, bytes()).prop_map(|(dev, id, status, data)| {
            Entry::Input(Input::BlkDone { dev, id, status, data })
        }),
        (any::<u8>(), bytes()).prop_map(|(dev, bytes)| Entry::Input(Input::Console { dev, bytes })),
        (any::<u8>(), bytes()).prop_map(|(dev, bytes)| Entry::Input(Input::Entropy { dev, bytes })),
        Just(Entry::Input(Input::PowerOff)),
        (any::<u8>(), any::<u64>())
            .prop_map(|(dev, size)| Entry::Input(Input::DiskResized { dev, size })),
    ]
}

proptest! {
    #[test]
    fn decode_gives_back_what_was_encoded(
        steps in prop::collection::vec((0u64..1 << 40, entry()), 0..50),
        piece in 1usize..30,
        start in 0u64..1 << 50,
    ) {
        let start = LogPos { lsn: start / 3, icount: start };
        let clock = ClockBase { mtime: 77, at: 3, rate: 99 };
        let mut encoder = Encoder::new(start, clock);
        let (mut out, mut icount, mut records) = (vec![], start.icount, vec![]);
        for (delta, entry) in steps {
            icount += delta;
            let record = Record { icount, entry };
            encoder.append(&record, &mut out).unwrap();
            records.push(record);
        }
        let mut decoder = Decoder::new(start, clock);
        let mut got = vec![];
        for part in out.chunks(piece) {
            decoder.push(part);
            while let Some(record) = decoder.next().unwrap() {
                got.push(record);
            }
        }
        prop_assert_eq!(got, records);
        prop_assert_eq!(decoder.position(), encoder.end());
        prop_assert_eq!(decoder.clock, encoder.clock());
        prop_assert_eq!(decoder.bytes_pending(), 0);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(prop_oneof![0u8..16, any::<u8>()], 0..400)) {
        let mut decoder = Decoder::new(LogPos::default(), ClockBase::default());
        let mut records = vec![];
        let mut taken = 0;
        for part in bytes.chunks(7) {
            taken += part.len();
            decoder.push(part);
            prop_assert!(decoder.buf.len() <= taken);
            while let Ok(Some(record)) = decoder.next() {
                records.push(record);
            }
        }
        // Whatever decodes is canonical: encoding it again gives the same bytes.
        let again = encode(&records);
        prop_assert_eq!(&again[..], &bytes[..again.len()]);
    }
}
