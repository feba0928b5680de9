//! Reads a sector through a vhost-user disk: `cargo run --example drive_device -- SOCKET SECTOR`
//!
//! The program does what a VMM and its guest's driver do: it owns the memory, negotiates features, starts a ring, and puts
//! a request on it. It prints the sector, and the pages that the back-end has marked in the dirty log.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::EventFd;
use vhost_migrate::abi::virtio::*;
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::frontend::{Device, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{GuestAddress, Memory, Region};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase, RingLayout};
use zerocopy::IntoBytes;

// The memory map: everything has a page of its own.
const DESCRIPTORS: GuestAddress = GuestAddress(0x1000);
const AVAIL: GuestAddress = GuestAddress(0x2000);
const USED: GuestAddress = GuestAddress(0x3000);
const HEADER: GuestAddress = GuestAddress(0x4000);
const DATA: GuestAddress = GuestAddress(0x5000);
const STATUS: GuestAddress = GuestAddress(0x6000);
const MEMORY: u64 = 0x10000;

const QUEUE_SIZE: u16 = 16;
const TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, sector] = &arguments[..] else { return Err("usage: drive_device SOCKET SECTOR".into()) };
    let sector: u64 = sector.parse()?;

    // Connect, negotiate features, and share the memory.
    let mut disk = UserDevice::connect(socket, UserOptions::default(), Instant::now() + TIMEOUT)?;
    let features = disk.features() & VIRTIO_F_VERSION_1;
    disk.set_features(features)?;
    let region = Region::create(GuestAddress(0), MEMORY)?;
    let memory = Memory::new([Arc::new(region)])?;
    disk.set_memory(&memory)?;

    // The configuration space of a disk begins with its capacity.
    let mut capacity = [0; 8];
    disk.config(0, &mut capacity)?;
    println!("disk: {} sectors", u64::from_le_bytes(capacity));

    // From here on the back-end marks every page that it writes.
    let (log, fd) = Log::create(memory.end())?;
    let log = Arc::new(log);
    disk.start_logging(&log, fd.as_fd())?;

    // Start ring 0.
    let (kick, call) = (Arc::new(OwnedFd::from(EventFd::new()?)), Arc::new(OwnedFd::from(EventFd::new()?)));
    let layout = RingLayout::new(features, QUEUE_SIZE, [DESCRIPTORS, AVAIL, USED]);
    let mut ring = DriverRing::new(&memory, layout, features)?;
    let setup = RingSetup {
        size: QUEUE_SIZE,
        desc: DESCRIPTORS,
        avail: AVAIL,
        used: USED,
        kick: kick.clone(),
        call: call.clone(),
        error: None,
        base: RingBase::initial(features),
    };
    disk.start_ring(0, setup)?;

    // A read request: the device reads the header, and writes the data and the status.
    let header = BlkRequestHeader { request_type: VIRTIO_BLK_T_IN.into(), ioprio: 0.into(), sector: sector.into() };
    memory.write(HEADER, header.as_bytes())?;
    memory.write(STATUS, &[0xff])?;
    let readable = [Buffer { gpa: HEADER, len: size_of::<BlkRequestHeader>() as u32 }];
    let writable = [Buffer { gpa: DATA, len: SECTOR_BYTES as u32 }, Buffer { gpa: STATUS, len: 1 }];
    ring.add(&readable, &writable, None)?;
    if ring.publish() {
        nix::unistd::write(&kick, &1u64.to_ne_bytes())?;
    }

    // Wait for the notification, and take the completion from the used ring.
    let mut wait = [PollFd::new(call.as_fd(), PollFlags::POLLIN)];
    poll(&mut wait, TIMEOUT.as_millis() as u16)?;
    let used = ring.pop_used()?.ok_or("the back-end has not completed the request within 10 s")?;

    // Once a ring is stopped, its log is complete.
    disk.stop_ring(0)?;
    let (mut data, mut status) = ([0; SECTOR_BYTES as usize], [0]);
    memory.read(DATA, &mut data)?;
    memory.read(STATUS, &mut status)?;
    if status != [VIRTIO_BLK_S_OK] {
        return Err(format!("sector {sector} cannot be read: status {}", status[0]).into());
    }
    println!("sector {sector}: {}", data[..16].iter().map(|byte| format!("{byte:02x}")).collect::<String>());

    let mut dirty = PageSet::default();
    log.harvest(&mut dirty);
    println!("{} bytes written, dirty pages: {:?}", used.len, dirty.iter().map(|page| page.0).collect::<Vec<_>>());
    Ok(())
}
