//! A device in the style of rust-vmm: it knows nothing of logs and writes guest memory through vm-memory, and every
//! page it writes is in the shared dirty log while one is installed.
//!
//! `cargo run --example rust_vmm_device`

use std::error::Error;
use std::sync::Arc;

use vhost_migrate::dirty::{Log, LogBitmap, LogSwitch, PageSet};
use vhost_migrate::memory::PageNumber;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Start of the second region.
const HIGH: GuestAddress = GuestAddress(4 << 30);
/// The status byte of the device.
const STATUS: GuestAddress = GuestAddress(0x8000);

/// Guest memory as the device sees it: the bitmap of each region leads to the switch.
type Memory = GuestMemoryMmap<LogBitmap<LogSwitch>>;

/// A device that fills a buffer of the guest with numbers, and then writes a status byte.
struct Counter(Memory);

impl Counter {
    fn fill(&self, buffer: GuestAddress, len: usize) -> Result<(), vm_memory::GuestMemoryError> {
        let numbers: Vec<u8> = (0..len).map(|i| i as u8).collect();
        self.0.write_slice(&numbers, buffer)?;
        self.0.write_obj(1u8, STATUS)
    }
}

fn memory(switch: &Arc<LogSwitch>, regions: &[(GuestAddress, usize)]) -> Result<Memory, Box<dyn Error>> {
    let mut mapped = Vec::new();
    for &(gpa, size) in regions {
        let bitmap = LogBitmap::new(Arc::clone(switch), gpa);
        let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()?;
        mapped.push(GuestRegionMmap::new(mapping, gpa).ok_or("a region that wraps around")?);
    }
    Ok(Memory::from_regions(mapped)?)
}

fn harvest(log: &Log) -> PageSet {
    let mut pages = PageSet::default();
    log.harvest(&mut pages);
    pages
}

fn main() -> Result<(), Box<dyn Error>> {
    let switch = Arc::new(LogSwitch::new()?);
    let device = Counter(memory(&switch, &[(GuestAddress(0), 64 << 20), (HIGH, 64 << 20)])?);

    // Without a migration there is no log: these writes are not recorded.
    device.fill(GuestAddress(0x1000), 4096)?;

    // A migration begins: VHOST_USER_SET_LOG_BASE brings a log. Once `set` returns, answer the request.
    let (log, _fd_for_the_back_end) = Log::create(HIGH.unchecked_add(64 << 20))?;
    let log = Arc::new(log);
    switch.set(Some(Arc::clone(&log)))?;
    device.fill(HIGH.unchecked_add(0xfff), 2)?;
    let round = harvest(&log);
    println!("written while logging: {round:?}");
    assert!(round.iter().eq([0x8, 0x10_0000, 0x10_0001].map(PageNumber)), "the buffer is two pages, the status is one");

    device.fill(GuestAddress(0x5000), 10_000)?;
    let round = harvest(&log);
    println!("and in the next round: {round:?}");
    assert!(round.iter().eq((5..9).map(PageNumber)));

    // The migration ends: after `set` nothing is written to the log.
    switch.set(None)?;
    device.fill(GuestAddress(0x1000), 4096)?;
    assert!(harvest(&log).is_empty());
    Ok(())
}
