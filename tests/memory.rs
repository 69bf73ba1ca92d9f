//! Memory does not grow with the tree: four times the data, the same peak.

use std::fs::{self, File};
use std::io::Write as _;

use e2e::agent::{Host, Place, boot_id};
use e2e::s3::{Effect, Kind};
use e2e::tree;

const BLOCK: usize = 4 << 20;

/// Peaks of a backup and of a restore of that many blocks of noise, in KiB. Both are read while the last request is held.
fn peaks(blocks: usize) -> [u64; 2] {
    let place = Place::memory();
    let mut host = Host::new(&place).booted('a');
    let _ = host.run(&["restore"]).expect(10);
    let noise = tree::noise(1, BLOCK);
    let mut file = File::create(host.root.join("noise")).expect("can make a file");
    for _ in 0..blocks {
        file.write_all(&noise).expect("there is room");
    }
    // A hole is no data, whatever its size.
    let sparse = File::create(host.root.join("sparse")).expect("can make a file");
    sparse.set_len(1 << 30).expect("can set a length");

    let peak_of = |host: &Host, verb: &str| {
        place.s3().take_requests();
        place
            .s3()
            .add_fault(Kind::Put, "head.json", 1, Effect::Hold);
        let running = host.start(&[verb]);
        place.s3().wait_for(Kind::Put, "head.json");
        let peak = running.peak_memory();
        place.s3().release();
        let _ = running.wait().expect(0);
        peak
    };
    let backup = peak_of(&host, "backup");
    fs::remove_dir_all(&host.root).expect("it is there");
    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    let restore = peak_of(&host, "restore");
    assert_eq!(
        fs::metadata(host.root.join("noise"))
            .expect("it is back")
            .len(),
        (blocks * BLOCK) as u64
    );
    [backup, restore]
}

#[test]
fn four_times_the_data_takes_no_more_memory() {
    let (small, large) = (peaks(25), peaks(100));
    println!("peak resident KiB of backup and restore: 100 MiB {small:?}, 400 MiB {large:?}");
    let more = (75 * BLOCK) as u64 / 1024;
    for (small, large) in small.into_iter().zip(large) {
        // What the allocator makes of the same work differs by some MiB from run to run.
        assert!(
            large.saturating_sub(small) < more / 4,
            "{small} KiB for 100 MiB, {large} KiB for 400 MiB"
        );
    }
}
