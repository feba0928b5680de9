//! Postcopy: guest memory that arrives page by page while devices use it, and front-ends that fail to provide it (rule
//! P1).

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, ProtocolFeatures};
use vhost_migrate::abi::virtio::{VIRTIO_NET_F_MRG_RXBUF, VirtioFeatures};
use vhost_migrate::backend::blk::Aio;
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{BackendAddresses, Device as _, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{
    Address, FaultAddress, GuestAddress, LOG_PAGE, Memory, Region, UserAddress, Userfault, sealed_memfd,
};
use vhost_migrate::ring::{Buffer, DriverRing, RingBase, SplitLayout};
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::{
    BASIC, Guest, HIGH, PACKED, PROTOCOL_FEATURES_BIT, REGION, Ring, SPLIT, harvest, negotiate, pages,
    request_addresses,
};
use crate::hostile::assert_ring_works;
use crate::raw::{DEADLINE, NEED_REPLY, RawFrontend, VERSION};
use crate::server::{Process, Server};

const DISK: u64 = 1 << 20;
const LENGTH: u32 = 0x3000;
const REQUESTS: u64 = 24;

fn server(change: impl FnOnce(&mut vhost_migrate::backend::blk::BlkOptions)) -> Server {
    Server::disk(DISK, |options| {
        options.postcopy = true;
        change(options);
    })
}

fn driver(folder: &Path, queue_pairs: bool) -> UserDevice {
    let path = folder.join("socket");
    let mut options = UserOptions::default().with_queue_pairs(queue_pairs);
    options.protocol_features |= ProtocolFeatures::PAGEFAULT;
    UserDevice::connect(path, options, Instant::now() + DEADLINE).unwrap()
}

fn huge(name: &std::ffi::CStr) -> OwnedFd {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB).unwrap();
    nix::unistd::ftruncate(&fd, REGION as i64).unwrap();
    fd
}

fn memory_of(make: impl Fn() -> OwnedFd) -> Memory {
    let share = |gpa| Arc::new(Region::share(make(), gpa, REGION, 0).unwrap());
    Memory::new([share(GuestAddress(0)), share(HIGH)]).unwrap()
}

/// Serves page faults of the back-end from the source memory.
struct PageServer<'a> {
    from: &'a Memory,
    to: &'a Memory,
    /// The userfaultfd of this process; the next one is the back-end's.
    own: Userfault,
    theirs: Userfault,
    stop: AtomicBool,
}

impl PageServer<'_> {
    /// Serves faults until `stop` is set. Returns the pages that the back-end has asked for.
    fn serve(&self, addresses: &BackendAddresses) -> BTreeSet<GuestAddress> {
        let mut asked = BTreeSet::new();
        while !self.stop.load(Ordering::Relaxed) {
            let mut fds = [&self.own, &self.theirs].map(|fault| PollFd::new(fault.as_fd(), PollFlags::POLLIN));
            poll(&mut fds, 10u8).unwrap();
            while let Some(address) = self.theirs.fault().unwrap() {
                let gpa = addresses.gpa(address).expect("a fault outside guest memory");
                asked.insert(self.serve_page(gpa, addresses));
            }
            while let Some(address) = self.own.fault().unwrap() {
                // The addresses in this process are also those in memory tables.
                let gpa = self.to.gpa_of_user(UserAddress(address.0), 1).unwrap();
                self.serve_page(gpa, addresses);
            }
        }
        asked
    }

    /// Provides all pages, also those without a fault.
    fn serve_all_pages(&self, addresses: &BackendAddresses) {
        for region in self.to.regions() {
            for offset in (0..region.size()).step_by(region.page_size() as usize) {
                self.serve_page(region.gpa().unchecked_add(offset), addresses);
            }
        }
    }

    /// Provides the page that contains `gpa`, and returns its address.
    fn serve_page(&self, gpa: GuestAddress, addresses: &BackendAddresses) -> GuestAddress {
        let region = self.to.regions().iter().rfind(|region| region.gpa() <= gpa).unwrap();
        let size = region.page_size();
        let gpa = GuestAddress(gpa.0 / size * size);
        let offset = gpa.unchecked_offset_from(region.gpa());
        let mut page = vec![0; size as usize];
        self.from.read(gpa, &mut page).unwrap();
        self.own.place(region, offset, &page).unwrap();
        // A thread that waits for the page waits on one of the two userfaultfds.
        self.own.wake(FaultAddress(region.user_addr().0 + offset), size).unwrap();
        self.theirs.wake(addresses.address(gpa).unwrap(), size).unwrap();
        gpa
    }
}

/// Parameters of a ring that was never used.
fn setup(ring: &Ring) -> RingSetup {
    let eventfd = |eventfd: &nix::sys::eventfd::EventFd| Arc::new(eventfd.as_fd().try_clone_to_owned().unwrap());
    let SplitLayout { size, desc, avail, used } = ring.layout;
    let (kick, call, base) = (eventfd(&ring.kick), eventfd(&ring.call), RingBase::from_bits(ring.initial_base()));
    RingSetup { size, desc, avail, used, kick, call, error: None, base }
}

/// Waits until the first `requests` of a ring, each of `slots` descriptors, are complete in memory `to`.
fn wait_for_requests(to: &Memory, ring: &Ring, requests: u16, slots: u16) {
    let (at, enough): (_, fn(u16, u16) -> bool) = match ring.driver {
        DriverRing::Split(_) => (ring.layout.used.unchecked_add(2), |index, requests| index >= requests),
        // The flags of the last request, in the ring's first round.
        DriverRing::Packed(_) => {
            let last = ring.layout.desc.unchecked_add(16 * u64::from((requests - 1) * slots));
            (last.unchecked_add(14), |flags, _| flags & 0x8080 == 0x8080)
        }
    };
    let (end, mut bytes) = (Instant::now() + DEADLINE, [0; 2]);
    while !enough(u16::from_le_bytes(bytes), requests) && Instant::now() < end {
        to.read(at, &mut bytes).unwrap();
    }
}

/// Copies the completions that the device has written from `found` to `expected`. Returns the head and length of each.
fn completions(found: &[u8], expected: &mut [u8], ring: &Ring, requests: u16, slots: u16) -> Vec<(u16, u32)> {
    let SplitLayout { desc: GuestAddress(desc), used: GuestAddress(used), .. } = ring.layout;
    let (at, step, head, len) = match ring.driver {
        DriverRing::Split(_) => (used as usize + 4, 8, 0, 4),
        DriverRing::Packed(_) => (desc as usize, 16 * usize::from(slots), 12, 8),
    };
    let bytes = if step == 8 { 8 } else { 16 };
    // The flags and index of a used ring, or a device event area.
    expected[used as usize..][..4].copy_from_slice(&found[used as usize..][..4]);
    let completion = |number: u16| {
        let element = at + step * usize::from(number);
        expected[element..][..bytes].copy_from_slice(&found[element..][..bytes]);
        let number = |at: usize| u32::from_le_bytes(found[element + at..][..4].try_into().unwrap());
        (number(head) as u16, number(len))
    };
    let completions = (0..requests).map(completion).collect();
    if step == 8 {
        // The avail_event field, where the device requests its next kick.
        let event = used as usize + 4 + 8 * usize::from(ring.layout.size);
        expected[event..][..2].copy_from_slice(&found[event..][..2]);
    }
    completions
}

/// The contents of a memory, by region.
fn contents(memory: &Memory) -> Vec<Vec<u8>> {
    let read = |region: &Arc<Region>| {
        let mut bytes = vec![0; region.size() as usize];
        memory.read(region.gpa(), &mut bytes).unwrap();
        bytes
    };
    memory.regions().iter().map(read).collect()
}

/// Asserts that the disk serves a guest's requests in memory `to`, which has no pages yet.
fn every_byte_arrives(server: &Server, to: &Memory, features: VirtioFeatures) {
    let guest = Guest::new();
    let mut ring = Ring::new(&guest, 0, 128, features);
    let heads: Vec<u16> = (0..REQUESTS)
        .map(|slot| match slot % 2 {
            0 => ring.read(&guest, slot, slot * 24, LENGTH),
            _ => ring.write(&guest, slot, 1024 + slot * 24, &[slot as u8; LENGTH as usize]),
        })
        .collect();
    let _ = ring.driver.publish();

    let mut device = driver(server.folder.path(), false);
    device.set_features(features & !PROTOCOL_FEATURES_BIT).unwrap();
    let (own, theirs) = (Userfault::new().unwrap(), device.postcopy_advise().unwrap());
    for region in to.regions() {
        own.register(region).unwrap();
    }
    device.postcopy_listen().unwrap();
    let postman = PageServer { from: &guest.memory, to, own, theirs, stop: AtomicBool::new(false) };
    let asked = thread::scope(|scope| {
        let mut serving = None;
        let ready = |addresses| serving = Some(scope.spawn(|| (postman.serve(&addresses), addresses)));
        device.postcopy_set_memory(to, ready).unwrap();
        device.start_ring(0, setup(&ring)).unwrap();
        ring.kick.write(1).unwrap();
        wait_for_requests(to, &ring, REQUESTS as u16, 3);
        let base = device.stop_ring(0);
        postman.stop.store(true, Ordering::Relaxed);
        assert_eq!(base.unwrap().bits(), ring.base_after(REQUESTS as u16, 3));
        let (asked, addresses) = serving.unwrap().join().unwrap();
        postman.serve_all_pages(&addresses);
        asked
    });
    device.postcopy_end().unwrap();
    assert!(device.postcopy_end().is_err(), "it has ended");
    for region in to.regions() {
        postman.own.unregister(region).unwrap();
    }
    let touched: BTreeSet<u64> = asked.iter().map(|gpa| gpa.0 / to.regions()[0].page_size()).collect();
    assert!(touched.len() > 2, "hardly a page was asked for: this has tested nothing");

    // The new memory is the old one with the disk's writes, and nothing else.
    let mut expected = guest.snapshot();
    let found = contents(to);
    let completed = completions(&found[0], &mut expected[0], &ring, REQUESTS as u16, 3);
    assert_eq!(completed.into_iter().map(|(head, _)| head).collect::<BTreeSet<_>>(), heads.into_iter().collect());
    let image = std::fs::read(server.image()).unwrap();
    for slot in 0..REQUESTS {
        let (_, status, data) = request_addresses(slot);
        expected[0][status.0 as usize] = 0;
        let on_disk = |sector: u64| &image[sector as usize * 512..][..LENGTH as usize];
        if slot % 2 == 0 {
            expected[1][data.unchecked_offset_from(HIGH) as usize..][..LENGTH as usize]
                .copy_from_slice(on_disk(slot * 24));
        } else {
            assert!(on_disk(1024 + slot * 24).iter().all(|byte| *byte == slot as u8), "write {slot}");
        }
    }
    assert!(found == expected, "memory differs");
}

/// Rules P1.4 and P1.6.
#[rstest]
fn a_disk_serves_requests_in_postcopy_memory(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let changes: [fn(&mut vhost_migrate::backend::blk::BlkOptions); 3] =
        [|_| {}, |options| options.aio = Aio::Threads, |options| options.direct = true];
    for change in changes {
        every_byte_arrives(&server(change), &memory_of(|| sealed_memfd("guest", REGION).unwrap()), features);
    }
}

/// The packets are received into buffers across page ends, between other bytes of the guest.
#[rstest]
fn packets_received_into_missing_postcopy_pages_are_intact_and_logged(#[values(SPLIT, PACKED)] rings: VirtioFeatures) {
    const PACKETS: u16 = 8;
    const LENGTHS: [usize; 3] = [4000, 4000, 1012];
    const HEADER: usize = 12;
    let folder = tempfile::tempdir().unwrap();
    let _process = Process::net(&folder.path().join("socket"), &["--loopback", "--postcopy"]);
    let features = rings | VIRTIO_NET_F_MRG_RXBUF;
    let guest = Guest::new();
    guest.memory.write(HIGH, &[0xee; 1 << 20]).unwrap();
    let [mut rx, mut tx] = [0, 1].map(|index| Ring::new(&guest, index, 128, features));
    let buffer = |number: usize| HIGH.unchecked_add(number as u64 * 0x3000 + 0xf00);
    let mut heads = Vec::new();
    for packet in 0..usize::from(PACKETS) {
        let message = [vec![0; HEADER], vec![packet as u8 + 1; 9000]].concat();
        let sent = Buffer { gpa: GuestAddress(0xc0_0000 + packet as u64 * 0x4000), len: message.len() as u32 };
        guest.memory.write(sent.gpa, &message).unwrap();
        tx.driver.add(&[sent], &[], None).unwrap().unwrap();
        for number in 3 * packet..3 * packet + 3 {
            let buffer = Buffer { gpa: buffer(number), len: 4000 };
            heads.push(rx.driver.add(&[], &[buffer], None).unwrap().unwrap());
        }
    }
    let _ = (rx.driver.publish(), tx.driver.publish());
    let buffers = heads.len() as u16;

    let to = memory_of(|| sealed_memfd("guest", REGION).unwrap());
    let mut device = driver(folder.path(), true);
    device.set_features(features & !PROTOCOL_FEATURES_BIT).unwrap();
    let (own, theirs) = (Userfault::new().unwrap(), device.postcopy_advise().unwrap());
    for region in to.regions() {
        own.register(region).unwrap();
    }
    device.postcopy_listen().unwrap();
    let (log, log_fd) = Log::create(to.end()).unwrap();
    let log = Arc::new(log);
    let postman = PageServer { from: &guest.memory, to: &to, own, theirs, stop: AtomicBool::new(false) };
    let asked = thread::scope(|scope| {
        let mut serving = None;
        let ready = |addresses| serving = Some(scope.spawn(|| (postman.serve(&addresses), addresses)));
        device.postcopy_set_memory(&to, ready).unwrap();
        device.start_logging(&log, log_fd.as_fd()).unwrap();
        for ring in [&rx, &tx] {
            device.start_ring(ring.index as u16, setup(ring)).unwrap();
            ring.kick.write(1).unwrap();
        }
        wait_for_requests(&to, &tx, PACKETS, 1);
        wait_for_requests(&to, &rx, buffers, 1);
        let bases = [0, 1].map(|index| device.stop_ring(index).map(RingBase::bits));
        postman.stop.store(true, Ordering::Relaxed);
        let [received, sent] = bases.map(Result::unwrap);
        assert_eq!((received, sent), (rx.base_after(buffers, 1), tx.base_after(PACKETS, 1)));
        let (asked, addresses) = serving.unwrap().join().unwrap();
        postman.serve_all_pages(&addresses);
        asked
    });
    device.postcopy_end().unwrap();

    let (mut expected, found) = (guest.snapshot(), contents(&to));
    let lengths: Vec<(u16, u32)> = completions(&found[0], &mut expected[0], &rx, buffers, 1);
    let whole = heads.iter().copied().zip(LENGTHS.map(|len| len as u32).into_iter().cycle());
    assert_eq!(lengths, whole.collect::<Vec<_>>());
    completions(&found[0], &mut expected[0], &tx, PACKETS, 1);
    let mut written = BTreeSet::new();
    for packet in 0..usize::from(PACKETS) {
        let mut message = [vec![0; HEADER], vec![packet as u8 + 1; 9000]].concat();
        message[HEADER - 2] = 3;
        for (number, len) in (3 * packet..).zip(LENGTHS) {
            let part: Vec<u8> = message.drain(..len).collect();
            expected[1][buffer(number).unchecked_offset_from(HIGH) as usize..][..len].copy_from_slice(&part);
            written.extend(pages(buffer(number), len as u64));
        }
    }
    assert!(found == expected, "memory differs");
    assert!(written.iter().all(|page| asked.contains(&GuestAddress(page * LOG_PAGE))), "a page was not asked for");
    let marked = harvest(&log);
    assert_eq!(written.difference(&marked).count(), 0, "written and not logged");
    let of_rings: BTreeSet<u64> = [&rx, &tx]
        .into_iter()
        .flat_map(|ring| match ring.driver {
            DriverRing::Split(_) => vec![(ring.layout.used, 6 + 8 * 128)],
            DriverRing::Packed(_) => vec![(ring.layout.desc, 16 * 128), (ring.layout.used, 4)],
        })
        .flat_map(|(gpa, len)| pages(gpa, len))
        .collect();
    let others: Vec<_> = marked.difference(&written).filter(|page| !of_rings.contains(page)).collect();
    assert!(others.is_empty(), "{others:?} logged and not written");
    assert!(marked.intersection(&of_rings).count() >= 2, "the rings are logged too");
}

/// Starts a postcopy with `server` whose pages never arrive, and a ring whose worker waits for them.
fn start_with_worker_waiting(server: &Server) -> (RawFrontend, Guest, Ring) {
    let guest = Guest::new();
    let mut ring = Ring::new(&guest, 0, 128, BASIC);
    ring.read(&guest, 0, 0, 512);
    let _ = ring.driver.publish();
    let empty = Guest::new();
    let client = negotiate_postcopy(server);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
    client.send(Code::SET_MEM_TABLE, NEED_REPLY, &empty.table(), &empty.fds());
    assert_eq!(client.reply(Code::SET_MEM_TABLE).len(), empty.table().len());
    client.send(Code::SET_MEM_TABLE, NEED_REPLY, 0u64.as_bytes(), &[]);
    ring.set_up(&client, &empty, 0);
    ring.enable(&client, true);
    // The back-end processes this request, although it cannot read the ring.
    client.send(Code::SET_VRING_CALL, VERSION, 0u64.as_bytes(), &[ring.call.as_fd()]);
    client.wait_until_processed();
    (client, empty, ring)
}

/// A connection after POSTCOPY_ADVISE, whose userfaultfd is not read.
fn negotiate_postcopy(server: &Server) -> RawFrontend {
    let client = server.connect();
    client.send_body(Code::SET_PROTOCOL_FEATURES, &client.request_u64(Code::GET_PROTOCOL_FEATURES));
    client.send_acknowledged(Code::SET_FEATURES, &BASIC, &[]);
    client.send(Code::POSTCOPY_ADVISE, VERSION, &[], &[]);
    let (header, payload, fd) = client.receive();
    assert_eq!((header.flags, payload.len()), (5, 0));
    // A front-end keeps the descriptor open while it runs. Threads wait for pages only while it is open.
    std::mem::forget(fd.unwrap());
    client
}

/// Asserts that the disk serves another front-end.
fn assert_served(server: &Server) {
    let (client, guest) = (server.connect(), Guest::new());
    negotiate(&client, &guest, BASIC);
    let mut ring = Ring::new(&guest, 0, 128, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    ring.read(&guest, 0, 0, 512);
    ring.serve_one();
    client.ring_base(0);
}

/// Rule P1.8.
#[test]
fn a_hang_up_during_postcopy_releases_waiting_workers_and_leaves_memory_unchanged() {
    let server = server(|_| {});
    for _ in 0..3 {
        let (client, guest, _ring) = start_with_worker_waiting(&server);
        drop(client);
        assert_served(&server);
        let unwritten = |fd: std::os::fd::BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_blocks == 0;
        assert!(guest.fds().into_iter().all(unwritten), "pages were made up");
    }
}

/// Rules P1.3 and P1.7.
#[test]
fn postcopy_messages_out_of_order_are_refused_and_the_back_end_continues() {
    let server = server(|_| {});
    let client = server.connect();
    let offered = ProtocolFeatures::from_bits_retain(client.request_u64(Code::GET_PROTOCOL_FEATURES));
    assert!(!offered.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS), "never both (rule P1.1)");
    client.send_body(Code::SET_PROTOCOL_FEATURES, &offered);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 1, "without ADVISE");
    assert_eq!(client.request_u64(Code::POSTCOPY_END), 1, "without ADVISE");
    Guest::new().send_table(&client);
    drop(client);

    let client = negotiate_postcopy(&server);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
    client.send(Code::POSTCOPY_ADVISE, VERSION, &[], &[]);
    assert!(client.receive().2.is_none(), "an fd for a postcopy that has begun");
    assert_eq!(client.request_u64(Code::POSTCOPY_END), 0);
    assert_eq!(client.request_u64(Code::POSTCOPY_END), 1, "twice");
    Guest::new().send_table(&client);
    drop(client);

    // No acknowledgement, a wrong one, and another request in its place.
    let guest = Guest::new();
    for (code, payload) in [(None, 0u64), (Some(Code::SET_MEM_TABLE), 1), (Some(Code::GET_FEATURES), 0)] {
        let client = negotiate_postcopy(&server);
        assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
        let table = client.request_with_fds(Code::SET_MEM_TABLE, &guest.table(), &guest.fds());
        assert_ne!(table, guest.table(), "the addresses are the back-end's");
        if let Some(code) = code {
            client.send(code, VERSION, payload.as_bytes(), &[]);
            assert!(client.is_closed());
        }
        drop(client);
        assert_served(&server);
    }

    // Memory that cannot be registered for missing pages ends the connection.
    let client = negotiate_postcopy(&server);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(REGION).unwrap();
    client.send(Code::SET_MEM_TABLE, VERSION, &guest.table(), &[file.as_fd(), file.as_fd()]);
    assert!(client.is_closed());
    drop(client);
    assert_served(&server);
}

/// Rules P1.2 and P1.5.
#[test]
fn invalid_postcopy_messages_are_refused_and_close_the_connection_only_after_listen() {
    let (server, guest) = (server(|_| {}), Guest::new());
    let client = negotiate_postcopy(&server);
    guest.send_table(&client);
    let mut ring = Ring::new(&guest, 0, 128, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    // The ring keeps running. A request that has no payload may be sent with one.
    for flags in [VERSION, NEED_REPLY] {
        client.send(Code::POSTCOPY_LISTEN, flags, &[0; 3], &[client.as_fd()]);
        assert_eq!(client.reply(Code::POSTCOPY_LISTEN), 1u64.to_le_bytes(), "a ring runs");
        assert_ring_works(&guest, &mut ring);
    }
    client.ring_base(0);
    client.send(Code::POSTCOPY_LISTEN, VERSION, &[0; 3], &[client.as_fd()]);
    assert_eq!(client.reply(Code::POSTCOPY_LISTEN), [0; 8]);
    // A memory table that is truncated, or without its fds, is refused.
    let table = guest.table();
    for (payload, fds) in [(&table[..3], guest.fds()), (&table[..60], guest.fds()), (&table[..], Vec::new())] {
        assert_eq!(client.acknowledged(Code::SET_MEM_TABLE, payload, &fds), 1, "{} bytes", payload.len());
    }
    client.send(Code::POSTCOPY_END, NEED_REPLY, &[0; 3], &[client.as_fd()]);
    assert_eq!(client.reply(Code::POSTCOPY_END), [0; 8]);
    guest.send_table(&client);
    drop(client);
    assert_served(&server);
    // The reply to SET_MEM_TABLE has no error number, so the connection ends.
    let client = negotiate_postcopy(&server);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
    client.send(Code::SET_MEM_TABLE, VERSION, &table[..60], &guest.fds());
    assert!(client.is_closed());
    drop(client);
    assert_served(&server);
    // A truncated acknowledgement.
    let client = negotiate_postcopy(&server);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
    client.request_with_fds(Code::SET_MEM_TABLE, &table, &guest.fds());
    client.send(Code::SET_MEM_TABLE, VERSION, &[0; 7], &[]);
    assert!(client.is_closed());
    drop(client);
    assert_served(&server);
}

/// A ring in scattered pages has a second mapping, and an access there does not wait for a missing page.
/// Rule P1.1.
#[test]
fn postcopy_is_not_offered_to_drivers_behind_an_iommu() {
    let server = server(|options| options.iommu = true);
    let client = server.connect();
    let offered = ProtocolFeatures::from_bits_retain(client.request_u64(Code::GET_PROTOCOL_FEATURES));
    assert!(!offered.contains(ProtocolFeatures::PAGEFAULT));
    assert!(offered.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS), "there is nothing in their way");
    client.send_body(Code::SET_PROTOCOL_FEATURES, &offered);
    client.wait_until_processed();
    let pagefault = offered | ProtocolFeatures::PAGEFAULT;
    assert_ne!(client.acknowledged(Code::SET_PROTOCOL_FEATURES, pagefault.as_bytes(), &[]), 0);
    client.send(Code::POSTCOPY_ADVISE, VERSION, &[], &[]);
    assert!(client.is_closed(), "an answer to a request that does not exist here");
    drop(client);
    assert_served(&server);
}

#[test]
fn a_disk_serves_requests_in_postcopy_huge_pages() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let pages: u64 = std::fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
    if pages < 24 {
        std::fs::write(POOL, "24").expect("as root, or after `sysctl vm.nr_hugepages=24`");
    }
    for features in [SPLIT, PACKED] {
        every_byte_arrives(&server(|_| {}), &memory_of(|| huge(c"guest")), features);
    }
}

/// Rule P1.4.
#[test]
fn the_set_mem_table_reply_holds_the_back_ends_own_addresses() {
    let server = server(|_| {});
    let guest = Guest::new();
    let client = negotiate_postcopy(&server);
    assert_eq!(client.request_u64(Code::POSTCOPY_LISTEN), 0);
    let reply = client.request_with_fds(Code::SET_MEM_TABLE, &guest.table(), &guest.fds());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for region in reply[8..].chunks(32) {
        let address = u64::read_from_bytes(&region[16..24]).unwrap();
        assert!(maps.lines().any(|line| line.starts_with(&format!("{address:x}-"))), "{address:#x}");
    }
}
