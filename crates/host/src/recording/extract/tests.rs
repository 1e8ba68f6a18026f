//! Packets and disks as they are found in the files.

use machine::config::{DiskConfig, NetConfig};
use machine::offload::plain;

use super::*;

fn config() -> MachineConfig {
    MachineConfig {
        harts: 1,
        ram_size: 32 << 20,
        nets: vec![NetConfig { mac: [2; 6] }, NetConfig { mac: [4; 6] }],
        disks: vec![DiskConfig { size: 8192, readonly: false, serial: String::new() }],
        consoles: 0,
        rngs: 0,
        rtc_base_ns: 1_000_000_000,
        rng_seed: vec![],
    }
}

fn blk(id: u64, op: BlkOp) -> Output {
    Output { icount: id, kind: OutputKind::Blk { dev: 0, id, op } }
}

fn done(id: u64, status: BlkStatus, data: &[u8]) -> Input {
    Input::BlkDone { dev: 0, id, status, data: data.to_vec() }
}

#[test]
fn frames_are_blocks_with_interface_time_and_direction() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("net.pcapng");
    let mut extract = Extract::new(|_: &[u8]| {}, 1);
    extract.pcap(&path, &config()).unwrap();
    assert!(extract.pcap(&path, &config()).is_err(), "a file is not written over");
    let (sent, received) = ([7; 61], [9; 64]);
    let kind = OutputKind::NetTx { dev: 1, packet: plain(&sent) };
    extract.output(25, &Output { icount: 3, kind });
    extract.input(30, 4, &Input::NetRx { dev: 0, packet: plain(&received) });
    assert_eq!(extract.finish().unwrap().0, 2);
    let bytes = std::fs::read(&path).unwrap();
    let (mut at, mut blocks) = (0, Vec::new());
    while at < bytes.len() {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let len = word(at + 4) as usize;
        assert!(len.is_multiple_of(4) && word(at + len - 4) as usize == len);
        blocks.push((word(at), &bytes[at + 8..at + len - 4]));
        at += len;
    }
    let kinds: Vec<u32> = blocks.iter().map(|b| b.0).collect();
    assert_eq!(kinds, [SECTION_HEADER, INTERFACE, INTERFACE, ENHANCED_PACKET, ENHANCED_PACKET]);
    let body = blocks[3].1;
    assert_eq!((body[0], u32::from_le_bytes(body[8..12].try_into().unwrap())), (1, 1_000_002_500));
    assert_eq!((&body[20..81], &body[84..92]), (&sent[..], &[2, 0, 4, 0, 2, 0, 0, 0][..]));
    assert_eq!((&blocks[4].1[20..84], blocks[4].1[88]), (&received[..], 1));
}

#[test]
fn disk_has_what_was_written_and_read_and_nothing_of_what_failed() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("disk");
    let mut extract = Extract::new(|_: &[u8]| {}, 1);
    extract.disk(0, &path, None, &config()).unwrap();
    let write = |offset, byte| BlkOp::Write { offset, data: vec![byte; 512] };
    extract.outstanding(vec![blk(0, write(0, 1)).kind]);
    extract.output(0, &blk(1, write(512, 2)));
    extract.output(0, &blk(2, write(1024, 3)));
    extract.output(0, &blk(3, BlkOp::Read { offset: 2048, len: 1024 }));
    extract.output(0, &blk(4, BlkOp::WriteZeroes { offset: 512, len: 512 }));
    for (id, status, data) in [
        (1, BlkStatus::Ok, &[][..]),
        (0, BlkStatus::Ok, &[]),
        (2, BlkStatus::IoErr, &[]),
        (3, BlkStatus::Ok, &[4; 1024]),
        (4, BlkStatus::Ok, &[]),
        (9, BlkStatus::Ok, &[]),
    ] {
        extract.input(0, 0, &done(id, status, data));
    }
    let (_, disks) = extract.finish().unwrap();
    assert_eq!((disks[0].known_bytes, disks[0].size), (4 * 512, 8192));
    let bytes = std::fs::read(&path).unwrap();
    let expected = [vec![1; 512], vec![0; 1536], vec![4; 1024], vec![0; 5120]].concat();
    assert!(bytes == expected);
}

#[test]
fn disk_that_is_not_the_recorded_one_is_refused_or_found_out() {
    let work = tempfile::tempdir().unwrap();
    let (base, path) = (work.path().join("base"), work.path().join("disk"));
    std::fs::write(&base, [5; 4096]).unwrap();
    let mut extract = Extract::new(|_: &[u8]| {}, 1);
    let refused = extract.disk(0, &path, Some(&base), &config()).unwrap_err();
    assert!(refused.to_string().contains("it has 4096 bytes"), "{refused}");
    assert!(!path.exists());
    std::fs::write(&base, [5; 8192]).unwrap();
    for (byte, is_right) in [(5, true), (6, false)] {
        let mut extract = Extract::new(|_: &[u8]| {}, 1);
        extract.disk(0, &path, Some(&base), &config()).unwrap();
        extract.output(0, &blk(1, BlkOp::Read { offset: 512, len: 512 }));
        extract.input(0, 0, &done(1, BlkStatus::Ok, &[byte; 512]));
        let (_, disks) = extract.finish().unwrap();
        assert_eq!(disks[0].mismatch.is_none(), is_right);
        std::fs::remove_file(&path).unwrap();
    }
}
